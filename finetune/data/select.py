"""Which rows are trained on, which are held out, and which are left out: decided by content and seed, not by position."""

from dataclasses import dataclass

import numpy as np

from finetune.data.config import DataConfig
from finetune.data.sources import Source
from finetune.data.store import Store
from finetune.errors import DataError

NOWHERE, TRAIN, HELDOUT = 0, 1, 2
SPLITS = ("", "train", "heldout")
LENGTH_REASONS = ("longer than max_tokens", "no trained token is left")
BY_MIX = "left out by the mix"
LEAKED = "is a held-out row too"
UNDESIRABLE = "marked undesirable"
SHOWN_BAD_ROWS = 5


@dataclass(slots=True)
class Selection:
    """One entry per input row.

    Attributes:
        split: ``NOWHERE``, ``TRAIN`` or ``HELDOUT``.
        duplicate_of: The first row of the same content, or -1.
        duplicates: Rows that repeat another, dropped or not.
        leaked: Training rows that are held-out rows too, dropped or not.
        mix: Rows by entry of ``data.sources``.
    """

    split: np.ndarray
    duplicate_of: np.ndarray
    duplicates: int
    leaked: int
    mix: dict[str, int]


def select(config: DataConfig, sources: list[Source], store: Store, *, seed: int) -> Selection:
    """Decides for all rows; refused ones get their reason in ``store.rows``.

    Raises:
        DataError: Bad rows where ``data.bad_rows`` is ``error``; or nothing is left.
    """
    rows = store.rows
    _refuse_bad(config, sources, store)
    heldout_source = np.array([source.heldout for source in sources])[rows["source"]]
    if config.objective == "supervised":
        rows["reason"][(rows["reason"] == 0) & (rows["desirable"] == 0)] = _reason_if(
            store, (rows["desirable"] == 0).any(), UNDESIRABLE
        )
    ok = rows["reason"] == 0
    duplicate_of = np.full(len(rows), -1, dtype=np.int64)
    for side in (heldout_source, ~heldout_source):
        _duplicates(rows["content"], np.flatnonzero(ok & side), duplicate_of)
    duplicates = int((duplicate_of >= 0).sum())
    if config.duplicates == "drop":
        ok &= duplicate_of < 0
    else:
        duplicate_of[:] = -1
    split = np.where(ok, np.where(heldout_source, HELDOUT, TRAIN), NOWHERE).astype(np.int8)
    mix = _mix(config, sources, store, split, seed=seed)
    if not config.heldout_path:
        _split_off(config, rows, split, seed=seed)
    leaked = _leaks(config, store, split)
    if not (split == TRAIN).any():
        raise DataError(f"no row is left to train on: {_why_none(store, duplicates)}; {_remedy(config, store)}")
    return Selection(split=split, duplicate_of=duplicate_of, duplicates=duplicates, leaked=leaked, mix=mix)


def _refuse_bad(config: DataConfig, sources: list[Source], store: Store) -> None:
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
        detail = store.details.get(int(number), "")
        row = rows[number]
        lines.append(
            f"  {sources[row['source']].name}:{row['line']}: {names[row['reason']]}{f' ({detail})' if detail else ''}"
        )
    counts = np.bincount(rows["reason"][numbers], minlength=len(names))
    more = "; ".join(
        f"{names[number]}: {counts[number]:,}" for number in np.argsort(-counts, kind="stable") if counts[number]
    )
    total = f"\n  ... {len(numbers):,} in all: {more}" if len(numbers) > SHOWN_BAD_ROWS else ""
    only_long = by_length[rows["reason"][numbers]].all()
    remedy = (
        "raise data.max_tokens or choose another data.too_long"
        if only_long
        else "mend them, or count and leave them out with data.bad_rows=drop"
    )
    raise DataError(f"{len(numbers):,} of {len(rows):,} rows cannot be used; {remedy}:\n" + "\n".join(lines) + total)


def _reason_if(store: Store, needed: bool, text: str) -> int:
    """Adds a reason to the table only where a row has it."""
    return store.reason(text) if needed else 0


def _duplicates(content: np.ndarray, numbers: np.ndarray, duplicate_of: np.ndarray) -> None:
    _, first, inverse = np.unique(content[numbers], return_index=True, return_inverse=True)
    originals = numbers[first][inverse]
    repeated = originals != numbers
    duplicate_of[numbers[repeated]] = originals[repeated]


def mixed(values: np.ndarray, *, seed: int) -> np.ndarray:
    """Hashes shuffled by the seed (SplitMix64's finalizer): an order that depends on content and seed only."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & (2**64 - 1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_order(store: Store, documents: np.ndarray) -> np.ndarray:
    """Held-out documents ordered by their content: whoever takes the first few gets a fair sample, the same one for each seed.

    Files are often sorted, by label say.
    """
    return documents[np.argsort(mixed(store.rows["content"][store.documents["row"][documents]], seed=0), kind="stable")]


def _mix(config: DataConfig, sources: list[Source], store: Store, split: np.ndarray, *, seed: int) -> dict[str, int]:
    """Thins the sources to the asked rows or weights."""
    if not config.sources:
        return {}
    names = list(config.sources)
    of_source = np.array([names.index(source.mix) if source.mix in names else -1 for source in sources])
    group = np.where(split == TRAIN, of_source[store.rows["source"]], -1)
    have = {name: int((group == number).sum()) for number, name in enumerate(names)}
    want = dict(have)
    weights = {name: entry.weight for name, entry in config.sources.items() if entry.weight is not None}
    if weights:
        unit = min(have[name] / weight for name, weight in weights.items())
        want = {name: round(unit * weight) for name, weight in weights.items()}
    for name, entry in config.sources.items():
        if entry.rows is not None:
            if entry.rows > have[name]:
                raise DataError(
                    f"data.sources.{name}.rows={entry.rows:,} but only {have[name]:,} usable rows are there; ask for fewer"
                )
            want[name] = entry.rows
    for number, name in enumerate(names):
        mine = np.flatnonzero(group == number)
        order = np.argsort(mixed(store.rows["content"][mine], seed=seed), kind="stable")
        left_out = mine[order[want[name] :]]
        store.rows["reason"][left_out] = _reason_if(store, len(left_out) > 0, BY_MIX)
        split[left_out] = NOWHERE
    return want


def _split_off(config: DataConfig, rows: np.ndarray, split: np.ndarray, *, seed: int) -> None:
    """Equal prompts go to one side, so that no held-out question has been answered in training."""
    numbers = np.flatnonzero(split == TRAIN)
    count = config.heldout_rows if config.heldout_rows is not None else round(config.heldout_share * len(numbers))
    if not count:
        return
    if count >= len(numbers):
        raise DataError(
            f"data.heldout_rows={count:,} would leave nothing to train on: {len(numbers):,} rows are usable; ask for fewer"
        )
    order = np.lexsort((mixed(rows["content"][numbers], seed=seed), mixed(rows["prompt"][numbers], seed=seed)))
    split[numbers[order[:count]]] = HELDOUT


def _leaks(config: DataConfig, store: Store, split: np.ndarray) -> int:
    training = np.flatnonzero(split == TRAIN)
    leaked = training[np.isin(store.rows["content"][training], store.rows["content"][split == HELDOUT])]
    if config.leaked == "drop" and len(leaked):
        store.rows["reason"][leaked] = store.reason(LEAKED)
        split[leaked] = NOWHERE
    return len(leaked)


def _remedy(config: DataConfig, store: Store) -> str:
    shortest = store.rows["full_tokens"][store.rows["full_tokens"] > 0]
    if not len(shortest) or shortest.min() <= config.max_tokens:
        return "look at data.format and data.columns"
    return (
        f"the shortest has {shortest.min():,} tokens or more and data.max_tokens is {config.max_tokens:,}: raise it, or choose another "
        "data.too_long (data=text splits long texts)"
    )


def _why_none(store: Store, duplicates: int) -> str:
    counts = np.bincount(store.rows["reason"], minlength=len(store.reasons) + 1)
    named = [f"{text}: {counts[number]:,}" for number, text in enumerate(store.reasons, 1) if counts[number]]
    return "; ".join([*named, *([f"duplicates: {duplicates:,}"] if duplicates else [])]) or "there were none"
