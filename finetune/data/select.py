"""Selects training rows, held-out rows and dropped rows by content and seed, not by position."""

from collections.abc import Iterator
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
    _refuse_bad(config, sources, store)
    split = store.array(np.int8, len(store.rows))
    duplicate_of = store.array(np.int64, len(store.rows), fill=-1)
    heldout_source = np.array([source.heldout for source in sources])
    for part in store.row_slices():
        rows = store.rows[part]
        if config.objective == SUPERVISED:
            _drop(store, part.start + np.flatnonzero((rows["reason"] == 0) & (rows["desirable"] == 0)), UNDESIRABLE)
        split[part] = np.where(rows["reason"] > 0, DROPPED, np.where(heldout_source[rows["source"]], HELDOUT, TRAIN))
    duplicates = 0
    for originals, repeats in _find_duplicates(store, split):
        duplicates += len(repeats)
        if config.duplicates == "drop":
            duplicate_of[repeats], split[repeats] = originals, DROPPED
    mix = _mix(config, sources, store, split, seed=seed)
    if not config.heldout_path and count_split(store, split, TRAIN):
        _holdout_split(config, store, split, seed=seed)
    leaked = _drop_leaked(config, store, split)
    if not count_split(store, split, TRAIN):
        raise DataError(f"no row is left to train on: {_reasons(store, duplicates)}; {_remedy(config, store)}")
    return Selection(split=split, duplicate_of=duplicate_of, duplicates=duplicates, leaked=leaked, mix=mix)


def _refuse_bad(config: DataConfig, sources: list[Source], store: TokenStore) -> None:
    names = ["", *store.reasons]
    by_length = np.array([name.startswith(LENGTH_REASONS) for name in names])
    is_bad = np.array(names) != ""
    if config.bad_rows == "drop":
        is_bad &= by_length & (config.too_long == "error")
    elif config.too_long != "error":
        is_bad &= ~by_length
    counts = np.zeros(len(names), np.int64)
    lines: list[str] = []
    for part in store.row_slices():
        rows = store.rows[part]
        bad = np.flatnonzero(is_bad[rows["reason"]])
        counts += np.bincount(rows["reason"][bad], minlength=len(names))
        for number in bad[: SHOWN_BAD_ROWS - len(lines)].tolist():
            text = store.details(part.start + number, part.start + number + 1).get(part.start + number, "")
            where = f"{sources[rows['source'][number]].name}:{rows['line'][number]}"
            lines.append(f"  {where}: {names[rows['reason'][number]]}{f' ({text})' if text else ''}")
    if not lines:
        return
    more = "; ".join(
        f"{names[number]}: {counts[number]:,}" for number in np.argsort(-counts, kind="stable") if counts[number]
    )
    total = int(counts.sum())
    rest = f"\n  ... {total:,} in all: {more}" if total > SHOWN_BAD_ROWS else ""
    remedy = (
        "raise data.max_tokens or choose another data.too_long"
        if not counts[~by_length].any()
        else "fix them, or drop and count them with data.bad_rows=drop"
    )
    raise DataError(f"{total:,} of {len(store.rows):,} rows cannot be used; {remedy}:\n" + "\n".join(lines) + rest)


def _drop(store: TokenStore, rows: np.ndarray, reason: str) -> None:
    """Sets the reason of rows. A reason without rows is not added to the store."""
    if len(rows):
        store.rows["reason"][rows] = store.reason(reason)


def count_split(store: TokenStore, split: np.ndarray, value: int) -> int:
    """Counts the rows whose split is ``value``."""
    return sum(int((split[part] == value).sum()) for part in store.row_slices())


def _find_duplicates(store: TokenStore, split: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the first rows of a content, and the rows of the same side that repeat them: shape (2, n)."""
    with store.keys() as keys:
        for rows in _rows(store, split, TRAIN, HELDOUT):
            keys.add(rows, store.rows["content"][rows], split[rows])
        yield from keys.repeats()


def _rows(store: TokenStore, split: np.ndarray, *values: int) -> Iterator[np.ndarray]:
    """Yields the numbers of the rows whose split is one of ``values``."""
    for part in store.row_slices():
        yield part.start + np.flatnonzero(np.isin(split[part], values))


def seeded_hashes(values: np.ndarray, *, seed: int) -> np.ndarray:
    """Combines hashes with a seed (SplitMix64's finalizer), for an order that depends on content and seed only."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & (2**64 - 1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_order(store: TokenStore, documents: Iterator[np.ndarray]) -> np.ndarray:
    """Orders held-out documents by a hash of their content, the same for every seed.

    The first documents are then a fair sample even where the file is sorted, by label for example.
    """
    with store.keys() as keys:
        for chunk in documents:
            keys.add(chunk, seeded_hashes(store.rows["content"][store.documents["row"][chunk]], seed=0))
        return store.collect(keys.in_order())


def _mix(
    config: DataConfig, sources: list[Source], store: TokenStore, split: np.ndarray, *, seed: int
) -> dict[str, int]:
    """Drops rows until the sources have the numbers of rows, or the weights, that ``data.sources`` sets."""
    if not config.sources:
        return {}
    names = list(config.sources)
    of_source = np.array([names.index(source.mix) if source.mix in names else -1 for source in sources])
    counts = np.zeros(len(names) + 1, np.int64)
    for rows in _rows(store, split, TRAIN):
        counts += np.bincount(of_source[store.rows["source"][rows]], minlength=len(counts))
    usable = dict(zip(names, counts.tolist(), strict=False))
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
        with store.keys() as keys:
            for rows in _rows(store, split, TRAIN):
                group = rows[of_source[store.rows["source"][rows]] == number]
                keys.add(group, seeded_hashes(store.rows["content"][group], seed=seed))
            for surplus in keys.in_order(start=target[name]):
                _drop(store, surplus, BY_MIX)
                split[surplus] = DROPPED
    return target


def _holdout_split(config: DataConfig, store: TokenStore, split: np.ndarray, *, seed: int) -> None:
    """Holds rows out. Equal prompts stay together, so that training answers no held-out question."""
    usable = count_split(store, split, TRAIN)
    count = config.heldout_rows if config.heldout_rows is not None else round(config.heldout_share * usable)
    if not count:
        return
    if count >= usable:
        raise DataError(
            f"data.heldout_rows={count:,} would leave nothing to train on: {usable:,} rows are usable; lower it"
        )
    with store.keys() as keys:
        for rows in _rows(store, split, TRAIN):
            keys.add(rows, *(seeded_hashes(store.rows[name][rows], seed=seed) for name in ("prompt", "content")))
        for chosen in keys.in_order(size=count):
            split[chosen] = HELDOUT


def _drop_leaked(config: DataConfig, store: TokenStore, split: np.ndarray) -> int:
    """Drops training rows that are also held-out rows, and counts them."""
    if config.duplicates == "drop" and not config.heldout_path:
        return 0  # all rows differ
    count = 0
    with store.keys() as keys:
        for side in (HELDOUT, TRAIN):  # so that the first row of the same content is a held-out one where there is one
            for rows in _rows(store, split, side):
                keys.add(rows, store.rows["content"][rows])
        for originals, repeats in keys.repeats():
            leaked = repeats[(split[originals] == HELDOUT) & (split[repeats] == TRAIN)]
            count += len(leaked)
            if config.leaked == "drop":
                _drop(store, leaked, LEAKED)
                split[leaked] = DROPPED
    return count


def _remedy(config: DataConfig, store: TokenStore) -> str:
    known = (store.rows["full_tokens"][part] for part in store.row_slices())
    shortest = min((int(tokens[tokens > 0].min()) for tokens in known if (tokens > 0).any()), default=0)
    if shortest <= config.max_tokens:
        return "check data.format and data.columns"
    return (
        f"the shortest has {shortest:,} tokens or more and data.max_tokens is {config.max_tokens:,}: raise it, "
        "or choose another data.too_long (data=text splits long texts)"
    )


def _reasons(store: TokenStore, duplicates: int) -> str:
    counts = store.count_reasons()
    named = [f"{text}: {counts[number]:,}" for number, text in enumerate(store.reasons, 1) if counts[number]]
    return "; ".join([*named, *([f"duplicates: {duplicates:,}"] if duplicates else [])]) or "there were none"
