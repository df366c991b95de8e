"""Runs the steps of the data preparation in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.cache import cache_folder, exclusive
from finetune.console import log
from finetune.data import cache
from finetune.data.checks import collect_warnings
from finetune.data.config import DataConfig
from finetune.data.encoder import serialize
from finetune.data.formats import ColumnMapping
from finetune.data.ledger import count_rows, write_ledger
from finetune.data.length_statistics import length_statistics
from finetune.data.pack import Packs, one_per_row, pack
from finetune.data.read import fill_store, find_thoughts, resolve_formats
from finetune.data.render import Renderer
from finetune.data.rendering import make_renderer, rendering_settings
from finetune.data.select import HELDOUT, TRAIN, hash_order, select
from finetune.data.show import log_summary, write_preview
from finetune.data.sources import Source, resolve_sources
from finetune.data.store import TokenStore
from finetune.data.worker import CHOSEN, REJECTED, WorkerSettings
from finetune.data.write import write_heldout, write_train
from finetune.errors import DataError
from finetune.objectives import PROMPT, SUPERVISED, UNPAIRED, format_problem
from finetune.products import UNDESIRABLE_HELDOUT, PreparedData
from finetune.run import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW_FORMATS = ("text", "completion")


@dataclass(frozen=True, kw_only=True)
class _Preparation:
    """What all steps share. ``key`` names the result by its content."""

    config: DataConfig
    sources: list[Source]
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    key: str
    seed: int


def prepare(config: DataConfig, *, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedData:
    """Prepares the data, or takes them from the cache. See `finetune.data.prepare`."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = resolve_sources(config)
    formats = resolve_formats(sources)
    _require_formats(config, sources, formats)
    raw = all(name in RAW_FORMATS for name, _ in formats.values())
    renderer = make_renderer(config, tokenizer, raw=raw, has_thoughts=lambda: find_thoughts(sources, formats))
    text, template = serialize(tokenizer), renderer.template
    special = template.special if template else {}
    extra = {"bos": renderer.bos, "eos": renderer.eos, "special": special, "thinking": renderer.thinking}
    source = template.source if template else None
    key = cache.cache_key(config, sources, tokenizer=text, template=source, extra=extra, seed=seed)
    preparation = _Preparation(
        config=config, sources=sources, folder=folder, tokenizer=tokenizer, renderer=renderer, key=key, seed=seed
    )
    settings = WorkerSettings(
        formats=formats,
        references=_references(config, sources),
        renderer=renderer,
        tokenizer=text,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        compares=config.objective != SUPERVISED,
    )
    root = cache_folder("data") if config.cache is None else Path(config.cache).expanduser() if config.cache else None
    if root is None:
        return _prepare(preparation, settings)
    with exclusive(root, key[:24], what="these data"):
        cached = cache.restore(root, key, folder)
        if cached is not None:
            log(
                "data",
                f"taken from the cache {root}: data, template, tokenizer, settings and code are those of {key[:12]}",
            )
            product = PreparedData(folder=folder, **cached)
            log_summary(product, config)
            return product
        product = _prepare(preparation, settings)
        fields = {name: getattr(product, name) for name in PreparedData.__dataclass_fields__ if name != "folder"}
        cache.save(root, key, folder, fields)
    return product


def _prepare(preparation: _Preparation, settings: WorkerSettings) -> PreparedData:
    store = TokenStore(preparation.folder / ".work")
    try:
        fill_store(preparation.config, preparation.sources, settings, store)
        store.close()
        return _write(preparation, store)
    finally:
        store.delete()


def _write(preparation: _Preparation, store: TokenStore) -> PreparedData:
    """Selects, packs, checks and writes the tokenized rows."""
    config, folder, key = preparation.config, preparation.folder, preparation.key
    selection = select(config, preparation.sources, store, seed=preparation.seed)
    split = selection.split[store.documents["row"]]
    good, bad = _answers(config, store)
    written = good | bad
    train = np.flatnonzero((split == TRAIN) & written)
    _require_both_kinds(config, good=int(good[train].sum()), bad=int(bad[train].sum()))
    heldout = hash_order(store, _first_pieces(store, np.flatnonzero((split == HELDOUT) & good)))
    packs = _packs(config, store, train, seed=preparation.seed)
    readable = store.rows[store.rows["full_tokens"] > 0]
    lengths = length_statistics(readable["full_tokens"], readable["full_trained"], max_tokens=config.max_tokens)
    write_train(folder / "train", store, packs, objective=config.objective, fingerprint=key)
    write_heldout(folder / "heldout", store, heldout, objective=config.objective, fingerprint=key)
    if config.objective == UNPAIRED:
        others = hash_order(store, _first_pieces(store, np.flatnonzero((split == HELDOUT) & bad)))
        write_heldout(folder / UNDESIRABLE_HELDOUT, store, others, objective=config.objective, fingerprint=f"{key}-bad")
    write_ledger(folder, store, selection, preparation.sources, train=packs, heldout=heldout)
    sizes = store.documents["length"][packs.documents]
    product = PreparedData(
        folder=folder,
        rows=count_rows(store, selection),
        tokens=int(sizes.sum()),
        trained_tokens=int(store.documents["trained"][train].sum()),
        packed_rows=len(packs),
        train_rows=int((selection.split == TRAIN).sum()),
        heldout_rows=len(heldout) if config.objective == UNPAIRED else int((selection.split == HELDOUT).sum()),
        longest=int(np.add.reduceat(sizes, packs.starts[:-1]).max()),
        fingerprint=key,
        warnings=collect_warnings(
            config, store, selection, tokenizer=preparation.tokenizer, renderer=preparation.renderer
        ),
        lengths=lengths,
        sources=[source.title() for source in preparation.sources],
    )
    write_json(folder / "lengths.json", lengths)
    settings = rendering_settings(preparation.renderer, preparation.tokenizer, config)
    write_json(folder / "rendering.json", settings | {"mix": selection.mix})
    write_preview(folder, product, config, tokenizer=preparation.tokenizer)
    log_summary(product, config)
    return product


def _require_formats(config: DataConfig, sources: list[Source], formats: dict[int, tuple[str, ColumnMapping]]) -> None:
    for number, (name, _) in formats.items():
        if problem := format_problem(config.objective, name, where=sources[number].name):
            raise DataError(problem)


def _answers(config: DataConfig, store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """Returns which documents are rows of their own: the good answers, and those that only ``unpaired`` has."""
    chosen, rejected = (store.documents["role"] == role for role in (CHOSEN, REJECTED))
    if config.objective != UNPAIRED:
        return chosen, np.zeros(len(chosen), dtype=bool)
    labelled_bad = store.rows["desirable"][store.documents["row"]] == 0
    return chosen & ~labelled_bad, rejected | (chosen & labelled_bad)


def _require_both_kinds(config: DataConfig, *, good: int, bad: int) -> None:
    if config.objective != UNPAIRED:
        return
    if not good or not bad:
        kind = "desirable" if good else "undesirable"
        raise DataError(
            f"data.objective=unpaired: all {good + bad:,} training answers are {kind}, so there is nothing to compare; "
            "add rows with the other label, or train on the desirable ones with train=default data.objective=supervised"
        )
    log("data", f"{good:,} desirable and {bad:,} undesirable answers to train on")


def _first_pieces(store: TokenStore, documents: np.ndarray) -> np.ndarray:
    """Returns the first piece of every held-out row: an evaluated row must have one prompt and one answer."""
    if not len(documents):
        return documents
    rows = store.documents["row"][documents]
    return documents[np.concatenate([[True], rows[1:] != rows[:-1]])]


def _packs(config: DataConfig, store: TokenStore, documents: np.ndarray, *, seed: int) -> Packs:
    if config.packing and config.objective != SUPERVISED:
        reason = "is for comparing complete answers" if config.objective != PROMPT else "prepares one prompt a row"
        log("data", f"not packed, because data.objective={config.objective} {reason}")
    elif config.packing:
        capacity = config.pack_tokens or config.max_tokens
        generator = np.random.default_rng(seed)
        return pack(documents, store.documents["length"][documents], capacity=capacity, generator=generator)
    return one_per_row(documents)


def _references(config: DataConfig, sources: list[Source]) -> frozenset[int]:
    """Returns the sources whose answers are kept as text: some rows may be held out, or rewards compare with them."""
    splits = not config.heldout_path and (config.heldout_share > 0 or config.heldout_rows is not None)
    every = splits or config.objective == PROMPT
    return frozenset(number for number, source in enumerate(sources) if source.heldout or every)
