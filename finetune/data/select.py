"""Selects training rows, held-out rows and dropped rows by content and seed, not by position."""

from dataclasses import dataclass

import numpy as np

from finetune.data.config import DataConfig
from finetune.data.sources import Source
from finetune.data.store import TokenStore
from finetune.errors import DataError
from finetune.objectives import SUPERVISED

DROPPED, TRAIN, HELDOUT = 0, 1, 2
SPLITS = ("", "train", "heldout")
LENGTH_REASONS = ("longer than max_tokens", "no trained token is left")
BY_MIX = "not needed for the mix"
LEAKED = "is also a held-out row"
UNDESIRABLE = "marked undesirable"
SHOWN_BAD_ROWS = 5


@dataclass(slots=True)
class Selection:
    """The split of every row.

    Attributes:
        split: ``DROPPED``, ``TRAIN`` or ``HELDOUT`` for each input row.
        duplicate_of: For each input row, the first row of the same content, or -1.
        duplicates: Number of rows that repeat another, dropped or not.
        leaked: Number of training rows that are also held-out rows, dropped or not.
        mix: Entry of ``data.sources`` -> number of rows.
    """

    split: np.ndarray
    duplicate_of: np.ndarray
    duplicates: int
    leaked: int
    mix: dict[str, int]


def select(config: DataConfig, sources: list[Source], store: TokenStore, *, seed: int) -> Selection:
    """Decides about every row; dropped rows get their reason in ``store.rows``.

    Raises:
        DataError: There are bad rows and ``data.bad_rows`` is ``error``, or no row is left.
    """
    rows = store.rows
    _refuse_bad(config, sources, store)
    heldout_source = np.array([source.heldout for source in sources])[rows["source"]]
    if config.objective == SUPERVISED:
        _drop(store, np.flatnonzero((rows["reason"] == 0) & (rows["desirable"] == 0)), UNDESIRABLE)
    usable = rows["reason"] == 0
    duplicate_of = np.full(len(rows), -1, dtype=np.int64)
    for side in (heldout_source, ~heldout_source):
        _find_duplicates(rows["content"], np.flatnonzero(usable & side), duplicate_of)
    duplicates = int((duplicate_of >= 0).sum())
    if config.duplicates == "drop":
        usable &= duplicate_of < 0
    else:
        duplicate_of[:] = -1
    split = np.where(usable, np.where(heldout_source, HELDOUT, TRAIN), DROPPED).astype(np.int8)
    mix = _mix(config, sources, store, split, seed=seed)
    if not config.heldout_path and (split == TRAIN).any():
        _holdout_split(config, rows, split, seed=seed)
    leaked = _drop_leaked(config, store, split)
    if not (split == TRAIN).any():
        raise DataError(f"no row is left to train on: {_reasons(store, duplicates)}; {_remedy(config, store)}")
    return Selection(split=split, duplicate_of=duplicate_of, duplicates=duplicates, leaked=leaked, mix=mix)


def _refuse_bad(config: DataConfig, sources: list[Source], store: TokenStore) -> None:
    rows = store.rows
    names = ["", *store.reasons]
    by_length = np.array([name.startswith(LENGTH_REASONS) for name in names])
    bad = rows["reason"] > 0
    if config.bad_rows == "drop":
        bad &= by_length[rows["reason"]] & (config.too_long == "error")
    elif config.too_long != "error":
        bad &= ~by_length[rows["reason"]]
    numbers = np.flatnonzero(bad)
    if not len(numbers):
        return
    lines = []
    for number in numbers[:SHOWN_BAD_ROWS]:
        detail = f" ({text})" if (text := store.details.get(int(number), "")) else ""
        row = rows[number]
        lines.append(f"  {sources[row['source']].name}:{row['line']}: {names[row['reason']]}{detail}")
    counts = np.bincount(rows["reason"][numbers], minlength=len(names))
    more = "; ".join(
        f"{names[number]}: {counts[number]:,}" for number in np.argsort(-counts, kind="stable") if counts[number]
    )
    total = f"\n  ... {len(numbers):,} in all: {more}" if len(numbers) > SHOWN_BAD_ROWS else ""
    only_too_long = by_length[rows["reason"][numbers]].all()
    remedy = (
        "raise data.max_tokens or choose another data.too_long"
        if only_too_long
        else "fix them, or drop and count them with data.bad_rows=drop"
    )
    raise DataError(f"{len(numbers):,} of {len(rows):,} rows cannot be used; {remedy}:\n" + "\n".join(lines) + total)


def _drop(store: TokenStore, rows: np.ndarray, reason: str) -> None:
    """Sets the reason of rows. A reason without rows is not added to the store."""
    if len(rows):
        store.rows["reason"][rows] = store.reason(reason)


def _find_duplicates(content: np.ndarray, numbers: np.ndarray, duplicate_of: np.ndarray) -> None:
    _, first, inverse = np.unique(content[numbers], return_index=True, return_inverse=True)
    originals = numbers[first][inverse]
    repeated = originals != numbers
    duplicate_of[numbers[repeated]] = originals[repeated]


def seeded_hashes(values: np.ndarray, *, seed: int) -> np.ndarray:
    """Combines hashes with a seed (SplitMix64's finalizer), for an order that depends on content and seed only."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & (2**64 - 1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_order(store: TokenStore, documents: np.ndarray) -> np.ndarray:
    """Orders held-out documents by a hash of their content, the same for every seed.

    The first documents are then a fair sample even where the file is sorted, by label for example.
    """
    content = store.rows["content"][store.documents["row"][documents]]
    return documents[np.argsort(seeded_hashes(content, seed=0), kind="stable")]


def _mix(
    config: DataConfig, sources: list[Source], store: TokenStore, split: np.ndarray, *, seed: int
) -> dict[str, int]:
    """Drops rows until the sources have the numbers of rows, or the weights, that ``data.sources`` sets."""
    if not config.sources:
        return {}
    names = list(config.sources)
    of_source = np.array([names.index(source.mix) if source.mix in names else -1 for source in sources])
    group = np.where(split == TRAIN, of_source[store.rows["source"]], -1)
    usable = {name: int((group == number).sum()) for number, name in enumerate(names)}
    target = dict(usable)
    weights = {name: entry.weight for name, entry in config.sources.items() if entry.weight is not None}
    if weights:
        unit = min(usable[name] / weight for name, weight in weights.items())
        target = {name: round(unit * weight) for name, weight in weights.items()}
    for name, entry in config.sources.items():
        if entry.rows is not None:
            if entry.rows > usable[name]:
                raise DataError(
                    f"data.sources.{name}.rows={entry.rows:,} but only {usable[name]:,} of its rows are usable"
                )
            target[name] = entry.rows
    for number, name in enumerate(names):
        rows = np.flatnonzero(group == number)
        order = np.argsort(seeded_hashes(store.rows["content"][rows], seed=seed), kind="stable")
        surplus = rows[order[target[name] :]]
        _drop(store, surplus, BY_MIX)
        split[surplus] = DROPPED
    return target


def _holdout_split(config: DataConfig, rows: np.ndarray, split: np.ndarray, *, seed: int) -> None:
    """Holds rows out. Equal prompts stay together, so that training answers no held-out question."""
    numbers = np.flatnonzero(split == TRAIN)
    count = config.heldout_rows if config.heldout_rows is not None else round(config.heldout_share * len(numbers))
    if not count:
        return
    if count >= len(numbers):
        raise DataError(
            f"data.heldout_rows={count:,} would leave nothing to train on: {len(numbers):,} rows are usable; lower it"
        )
    content, prompt = (seeded_hashes(rows[name][numbers], seed=seed) for name in ("content", "prompt"))
    order = np.lexsort((content, prompt))
    split[numbers[order[:count]]] = HELDOUT


def _drop_leaked(config: DataConfig, store: TokenStore, split: np.ndarray) -> int:
    training = np.flatnonzero(split == TRAIN)
    leaked = training[np.isin(store.rows["content"][training], store.rows["content"][split == HELDOUT])]
    if config.leaked == "drop":
        _drop(store, leaked, LEAKED)
        split[leaked] = DROPPED
    return len(leaked)


def _remedy(config: DataConfig, store: TokenStore) -> str:
    shortest = store.rows["full_tokens"][store.rows["full_tokens"] > 0]
    if not len(shortest) or shortest.min() <= config.max_tokens:
        return "check data.format and data.columns"
    return (
        f"the shortest has {shortest.min():,} tokens or more and data.max_tokens is {config.max_tokens:,}: raise it, "
        "or choose another data.too_long (data=text splits long texts)"
    )


def _reasons(store: TokenStore, duplicates: int) -> str:
    counts = np.bincount(store.rows["reason"], minlength=len(store.reasons) + 1)
    named = [f"{text}: {counts[number]:,}" for number, text in enumerate(store.reasons, 1) if counts[number]]
    return "; ".join([*named, *([f"duplicates: {duplicates:,}"] if duplicates else [])]) or "there were none"
