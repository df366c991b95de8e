"""Runs the steps of the data preparation in order."""

from __future__ import annotations

from collections.abc import Iterator
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
from finetune.data.select import HELDOUT, TRAIN, Selection, count_split, hash_order, select
from finetune.data.show import log_summary, write_preview
from finetune.data.sources import Source, resolve_sources
from finetune.data.store import TokenStore
from finetune.data.worker import CHOSEN, WorkerSettings
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
    root = _cache(config)
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


def _cache(config: DataConfig) -> Path | None:
    """Returns the cache of prepared data; None where there is none, or it cannot be made, which no run needs."""
    if config.cache is not None:
        return Path(config.cache).expanduser() if config.cache else None
    try:
        return cache_folder("data")
    except OSError as error:
        log("data", f"not cached for the next run, because {error.filename} cannot be made: {error.strerror}")
        return None


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
    _require_both_kinds(config, store, selection)
    train = store.collect(documents for documents, _ in _answers(config, store, selection, TRAIN))
    heldout = _heldout(config, store, selection, desirable=True)
    packs = _packs(config, store, train, seed=preparation.seed)
    lengths = length_statistics(_readable_lengths(store), max_tokens=config.max_tokens)
    write_train(folder / "train", store, packs, objective=config.objective, fingerprint=key)
    write_heldout(folder / "heldout", store, heldout, objective=config.objective, fingerprint=key)
    if config.objective == UNPAIRED:
        others = _heldout(config, store, selection, desirable=False)
        write_heldout(folder / UNDESIRABLE_HELDOUT, store, others, objective=config.objective, fingerprint=f"{key}-bad")
    write_ledger(folder, store, selection, preparation.sources, train=packs, heldout=heldout)
    tokens, trained_tokens, longest = _count_tokens(store, packs)
    train_rows, heldout_rows = (count_split(store, selection.split, side) for side in (TRAIN, HELDOUT))
    product = PreparedData(
        folder=folder,
        rows=count_rows(store, selection),
        tokens=tokens,
        trained_tokens=trained_tokens,
        packed_rows=len(packs),
        train_rows=train_rows,
        heldout_rows=len(heldout) if config.objective == UNPAIRED else heldout_rows,
        longest=longest,
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


def _answers(
    config: DataConfig, store: TokenStore, selection: Selection, split: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the documents of a split that are rows of their own, and whether each is a good answer.

    Only ``unpaired`` has other answers: the rejected ones and those of undesirable rows.
    """
    for part in store.document_slices():
        documents = store.documents[part]
        chosen = documents["role"] == CHOSEN
        is_own, is_good = chosen, chosen
        if config.objective == UNPAIRED:
            is_own = np.ones_like(chosen)
            is_good = chosen & (store.rows["desirable"][documents["row"]] != 0)
        at = np.flatnonzero(is_own & (selection.split[documents["row"]] == split))
        yield part.start + at, is_good[at]


def _require_both_kinds(config: DataConfig, store: TokenStore, selection: Selection) -> None:
    if config.objective != UNPAIRED:
        return
    good = bad = 0
    for _, is_good in _answers(config, store, selection, TRAIN):
        good += int(is_good.sum())
        bad += int((~is_good).sum())
    if not good or not bad:
        kind = "desirable" if good else "undesirable"
        raise DataError(
            f"data.objective=unpaired: all {good + bad:,} training answers are {kind}, so there is nothing to compare; "
            "add rows with the other label, or train on the desirable ones with train=default data.objective=supervised"
        )
    log("data", f"{good:,} desirable and {bad:,} undesirable answers to train on")


def _heldout(config: DataConfig, store: TokenStore, selection: Selection, *, desirable: bool) -> np.ndarray:
    """Returns the held-out documents in their order.

    Only the first piece of every row: an evaluated row must have one prompt and one answer.
    """

    def first_pieces() -> Iterator[np.ndarray]:
        last = -1
        for documents, is_good in _answers(config, store, selection, HELDOUT):
            wanted = documents[is_good == desirable]
            rows = store.documents["row"][wanted]
            yield wanted[np.diff(rows, prepend=last) != 0]
            last = rows[-1] if len(rows) else last

    return hash_order(store, first_pieces())


def _readable_lengths(store: TokenStore) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields tokens and trained tokens of the rows that could be read, before any was cut."""
    for part in store.row_slices():
        rows = store.rows[part]
        readable = rows[rows["full_tokens"] > 0]
        yield readable["full_tokens"], readable["full_trained"]


def _count_tokens(store: TokenStore, packs: Packs) -> tuple[int, int, int]:
    """Returns all tokens, those with a loss, and the tokens of the longest row."""
    tokens = trained = longest = 0
    for part in store.slices(len(packs)):
        documents, starts = packs.part(part)
        lengths = store.documents["length"][documents]
        tokens += int(lengths.sum())
        trained += int(store.documents["trained"][documents].sum())
        longest = max(longest, int(np.add.reduceat(lengths, starts[:-1]).max()))
    return tokens, trained, longest


def _packs(config: DataConfig, store: TokenStore, documents: np.ndarray, *, seed: int) -> Packs:
    if config.packing and config.objective != SUPERVISED:
        reason = "is for comparing complete answers" if config.objective != PROMPT else "prepares one prompt a row"
        log("data", f"not packed, because data.objective={config.objective} {reason}")
    elif config.packing:
        capacity = config.pack_tokens or config.max_tokens
        generator = np.random.default_rng(seed)
        lengths = store.documents["length"]
        return pack(documents, lengths, capacity=capacity, generator=generator, scratch=store)
    return one_per_row(documents, store)


def _references(config: DataConfig, sources: list[Source]) -> frozenset[int]:
    """Returns the sources whose answers are kept as text: some rows may be held out, or rewards compare with them."""
    splits = not config.heldout_path and (config.heldout_share > 0 or config.heldout_rows is not None)
    every = splits or config.objective == PROMPT
    return frozenset(number for number, source in enumerate(sources) if source.heldout or every)
