"""Rows that nearly repeat others, and training rows that held-out rows give away."""

from collections.abc import Iterator

import numpy as np

from finetune.data.checks.shingles import BANDS, NEAR_TOKENS, OVERLAP_TOKENS, SIGNATURE, shared_beginning, shingles
from finetune.data.store import Store

DOCUMENTS_AT_ONCE = 2000
LARGEST_CHECKED_PAIRS = 4000
TABLE_BITS = 24
LOOKED_AT_FOR_COMMON = 2000
COMMON_SHARE = 0.05
"""A run that stands in more held-out rows than this belongs to the template or the task, not to the row."""


def near_duplicates(store: Store, documents: np.ndarray, *, similarity: float) -> float:
    """Share of documents that nearly repeat another one.

    MinHash proposes pairs; each is then compared exactly. Of very many pairs an even sample is compared.
    """
    signatures = store.signatures[documents]
    pairs = _candidates(signatures)
    if not len(pairs):
        return 0.0
    checked = pairs[:: max(1, -(-len(pairs) // LARGEST_CHECKED_PAIRS))]
    skip = _beginning(store, documents)
    near = np.array([_jaccard(store, documents[a], documents[b], skip) >= similarity for a, b in checked])
    rows = len(np.unique(checked[near, 1])) * len(pairs) / len(checked)
    return min(rows / len(documents), 1.0)


def _candidates(signatures: np.ndarray) -> np.ndarray:
    """Pairs that agree on a whole band: the first of each group with each other member."""
    there = np.flatnonzero(signatures.any(axis=1))
    found = []
    for band in np.split(np.arange(SIGNATURE), BANDS):
        keys = np.ascontiguousarray(signatures[there][:, band]).view(np.dtype((np.void, 4 * len(band)))).ravel()
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        originals = first[inverse]
        repeated = originals != np.arange(len(there))
        found.append(np.stack([there[originals[repeated]], there[repeated]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _beginning(store: Store, documents: np.ndarray) -> int:
    """Tokens that an even sample of documents begins with: the system message and the template's marks are nobody's own words."""
    some = documents[:: max(1, -(-len(documents) // LOOKED_AT_FOR_COMMON))]
    return shared_beginning(store.tokens(some), store.documents["length"][some].astype(np.int64))


def _jaccard(store: Store, one: int, other: int, skip: int) -> float:
    sets = []
    for document in (one, other):
        ids = np.asarray(store.ids[store.starts[document] + skip : store.starts[document + 1]])
        sets.append(set(shingles(ids, np.array([len(ids)]), NEAR_TOKENS)[0].tolist()))
    return len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1)


def overlapping(store: Store, train: np.ndarray, heldout: np.ndarray, *, share: float) -> np.ndarray:
    """Training documents of whose 13-grams at least ``share`` occur in held-out rows."""
    table = _table(store, heldout, among=train)
    found = [np.zeros(0, dtype=np.int64)]
    if table.any():
        for some, hashes, counts in _batches(store, train):
            there = counts > 0
            if there.any():
                hits = np.add.reduceat(
                    table[hashes >> np.uint64(64 - TABLE_BITS)], (np.cumsum(counts) - counts)[there], dtype=np.int64
                )
                found.append(some[there][hits >= share * counts[there]])
    return np.concatenate(found)


def _table(store: Store, heldout: np.ndarray, *, among: np.ndarray) -> np.ndarray:
    """One cell per hash prefix; collisions are far rarer than the share that counts.

    Args:
        among: Training documents. Of few held-out rows alone one cannot tell what belongs to the template.
    """
    table = np.zeros(1 << TABLE_BITS, dtype=bool)
    hashes, rows = _runs(store, heldout)
    some = among[:: max(1, -(-len(among) // LOOKED_AT_FOR_COMMON))]
    theirs, often = _runs(store, some)
    common = theirs[often > max(2, COMMON_SHARE * len(some))]
    table[
        hashes[(rows <= max(2, COMMON_SHARE * len(heldout))) & ~np.isin(hashes, common)] >> np.uint64(64 - TABLE_BITS)
    ] = True
    return table


def _runs(store: Store, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every run of some documents, and in how many of them it stands."""
    seen = [
        np.unique(part)
        for _, hashes, counts in _batches(store, documents)
        for part in np.split(hashes, np.cumsum(counts)[:-1])
    ]
    return np.unique(np.concatenate(seen) if seen else np.zeros(0, np.uint64), return_counts=True)


def _batches(store: Store, documents: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for first in range(0, len(documents), DOCUMENTS_AT_ONCE):
        some = documents[first : first + DOCUMENTS_AT_ONCE]
        hashes, counts = shingles(store.tokens(some), store.documents["length"][some], OVERLAP_TOKENS)
        yield some, hashes, counts
