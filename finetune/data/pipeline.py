"""The order of the room's steps, and nothing else."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.cache import cache_folder, exclusive
from finetune.console import log
from finetune.data import cache, ledger, lengths, read, select, template, write
from finetune.data.checks.warn import warnings_of
from finetune.data.config import DataConfig
from finetune.data.generation import cross_check
from finetune.data.pack import Packs, alone, pack
from finetune.data.render import Renderer
from finetune.data.show.preview import write_preview
from finetune.data.show.summary import say_summary
from finetune.data.sources import Source, resolve
from finetune.data.store import Store
from finetune.data.tokens import serialized
from finetune.data.worker import CHOSEN, Job
from finetune.errors import DataError
from finetune.products import PreparedData
from finetune.run import write_json

RAW_FORMATS = ("text", "completion")
PREFERENCE_FORMATS = ("preference", "unpaired")


def run(config: DataConfig, *, folder: Path, tokenizer: Any, seed: int) -> PreparedData:
    """See ``prepare``."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = resolve(config)
    formats = read.formats_of(sources)
    if config.objective == "preference":
        _refuse_unpreferred(sources, formats)
    raw = all(name in RAW_FORMATS for name, _ in formats.values())
    if not raw or config.template:
        template.choose(config.template, tokenizer)
    renderer = _renderer(config, tokenizer, raw=raw)
    text = serialized(tokenizer)
    extra = {
        "bos": renderer.bos,
        "eos": renderer.eos,
        "special": renderer.template.special if renderer.template else {},
    }
    source_text = renderer.template.source if renderer.template else None
    key = cache.key(config, sources, tokenizer=text, template=source_text, extra=extra, seed=seed)
    root = cache_folder("data") if config.cache is None else Path(config.cache).expanduser() if config.cache else None
    where = _Where(folder, key, seed)
    if root is None:
        return _make(config, sources, formats, where, text=text, tokenizer=tokenizer, renderer=renderer)
    with exclusive(root, key[:24], what="these data"):
        known = cache.restore(root, key, folder)
        if known is not None:
            cache.credit(config)
            log(
                "data",
                f"taken from the cache {root}, because data, template, tokenizer, settings and code are those of {key[:12]}",
            )
            product = PreparedData(folder=folder, **known)
            say_summary(product, config)
            return product
        product = _make(config, sources, formats, where, text=text, tokenizer=tokenizer, renderer=renderer)
        cache.keep(
            root,
            key,
            folder,
            {name: getattr(product, name) for name in PreparedData.__dataclass_fields__ if name != "folder"},
        )
    return product


def _make(
    config: DataConfig,
    sources: list[Source],
    formats: dict[int, tuple[str, dict[str, str]]],
    where: _Where,
    *,
    text: str,
    tokenizer: Any,
    renderer: Renderer,
) -> PreparedData:
    job = Job(
        formats=formats,
        references=_references(config, sources),
        renderer=renderer,
        tokenizer=text,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        preference=config.objective == "preference",
    )
    store = Store(where.folder / ".work")
    try:
        read.run(config, sources, job, store)
        store.close()
        return _arrange(config, sources, store, where, tokenizer=tokenizer, renderer=renderer)
    finally:
        shutil.rmtree(where.folder / ".work", ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Where:
    folder: Path
    key: str
    seed: int


def _arrange(
    config: DataConfig, sources: list[Source], store: Store, where: _Where, *, tokenizer: Any, renderer: Renderer
) -> PreparedData:
    """From tokenised rows to files."""
    selection = select.select(config, sources, store, seed=where.seed)
    split_of = selection.split[store.documents["row"]]
    chosen = store.documents["role"] == CHOSEN
    train = np.flatnonzero((split_of == select.TRAIN) & chosen)
    heldout = select.hash_order(store, _one_piece(store, np.flatnonzero((split_of == select.HELDOUT) & chosen)))
    packs = _packs(config, store, train, seed=where.seed)
    readable = store.rows["full_tokens"] > 0
    measured = lengths.measure(
        store.rows["full_tokens"][readable], store.rows["full_trained"][readable], max_tokens=config.max_tokens
    )
    compares = config.objective == "preference"
    write.train(where.folder / "train", store, packs, preference=compares, fingerprint=where.key)
    write.heldout(where.folder / "heldout", store, heldout, preference=compares, fingerprint=where.key)
    ledger.write(where.folder, store, selection, sources, train=packs, heldout=heldout)
    sizes = store.documents["length"][packs.documents]
    product = PreparedData(
        folder=where.folder,
        rows=ledger.counts(store, selection),
        tokens=int(sizes.sum()),
        trained_tokens=int(store.documents["trained"][train].sum()),
        packed_rows=len(packs),
        train_rows=int((selection.split == select.TRAIN).sum()),
        heldout_rows=int((selection.split == select.HELDOUT).sum()),
        longest=int(np.add.reduceat(sizes, packs.starts[:-1]).max()),
        fingerprint=where.key,
        warnings=warnings_of(config, store, selection, tokenizer=tokenizer, renderer=renderer),
        lengths=measured,
        sources=[source.title() for source in sources],
    )
    write_json(where.folder / "lengths.json", measured)
    write_json(where.folder / "rendering.json", _rendering(config, tokenizer, renderer, selection.mix))
    write_preview(where.folder, product, config, tokenizer=tokenizer)
    say_summary(product, config)
    return product


def _refuse_unpreferred(sources: list[Source], formats: dict[int, tuple[str, dict[str, str]]]) -> None:
    for number, (name, _) in formats.items():
        if name not in PREFERENCE_FORMATS:
            raise DataError(
                f"data.objective=preference: {sources[number].name} has the format {name}, which has no worse answers; give rows with "
                "chosen and rejected, or with a label, or use data.objective=supervised"
            )


def _one_piece(store: Store, documents: np.ndarray) -> np.ndarray:
    """The first piece of every held-out row: what is scored must have one prompt and one answer."""
    if not len(documents):
        return documents
    rows = store.documents["row"][documents]
    return documents[np.concatenate([[True], rows[1:] != rows[:-1]])]


def _packs(config: DataConfig, store: Store, documents: np.ndarray, *, seed: int) -> Packs:
    if config.packing and config.objective == "preference":
        log("data", "not packed, because preference objectives compare whole rows")
    elif config.packing:
        capacity = config.pack_tokens or config.max_tokens
        generator = np.random.default_rng(seed)
        return pack(documents, store.documents["length"][documents], capacity=capacity, generator=generator)
    return alone(documents)


def _references(config: DataConfig, sources: list[Source]) -> frozenset[int]:
    """Sources whose answers are kept as text, because some of their rows may be held out."""
    splits = not config.heldout_path and (config.heldout_share > 0 or config.heldout_rows is not None)
    return frozenset(number for number, source in enumerate(sources) if source.heldout or splits)


def _renderer(config: DataConfig, tokenizer: Any, *, raw: bool) -> Renderer:
    eos, bos = tokenizer.eos_token, tokenizer.bos_token
    with_marks = tokenizer("a").input_ids
    chat = None if raw else template.probe(tokenizer)
    renderer = Renderer(
        template=chat,
        train_roles=frozenset(config.train_roles),
        system=config.system,
        control_tokens=config.control_tokens,
        tools=config.tools,
        bos=str(bos) if bos and with_marks[:1] == [tokenizer.bos_token_id] else "",
        eos=str(eos) if eos else "",
    )
    if chat:
        cross_check(chat, renderer)
    return renderer


def _rendering(config: DataConfig, tokenizer: Any, renderer: Renderer, mix: dict[str, int]) -> dict[str, Any]:
    """What serving must do the same way."""
    chat = renderer.template
    end = chat.end_of_turn if chat else renderer.eos
    return {
        "template": chat.source if chat else None,
        "end_of_turn": end,
        "end_of_turn_id": tokenizer.convert_tokens_to_ids(end) if end else None,
        "bos": renderer.bos,
        "train_roles": config.train_roles,
        "system": config.system,
        "control_tokens": config.control_tokens,
        "mix": mix,
    }
