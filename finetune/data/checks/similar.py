"""Finds near duplicates, and training documents that overlap with held-out ones."""

from collections.abc import Iterator

import numpy as np

from finetune.data.shingles import BANDS, NEAR_TOKENS, OVERLAP_TOKENS, SIGNATURE, shared_prefix_tokens, shingles
from finetune.data.store import TokenStore

BATCH_DOCUMENTS = 2000
LARGEST_CHECKED_PAIRS = 4000
TABLE_BITS = 24
SAMPLE_DOCUMENTS = 2000
COMMON_SHARE = 0.05
"""An n-gram in more than this share of the rows belongs to the template or the task, not to the row."""


def near_duplicates(store: TokenStore, documents: np.ndarray, *, similarity: float) -> float:
    """Returns the share of documents that nearly repeat another one.

    MinHash proposes pairs, which are then compared exactly. Of very many pairs, an even sample is compared.
    """
    signatures = store.signatures[documents]
    pairs = _candidate_pairs(signatures)
    if not len(pairs):
        return 0.0
    checked = pairs[:: max(1, -(-len(pairs) // LARGEST_CHECKED_PAIRS))]
    skip = _shared_prefix_tokens(store, documents)
    near = np.array([_jaccard(store, documents[a], documents[b], skip) >= similarity for a, b in checked])
    rows = len(np.unique(checked[near, 1])) * len(pairs) / len(checked)
    return min(rows / len(documents), 1.0)


def _candidate_pairs(signatures: np.ndarray) -> np.ndarray:
    """Returns pairs with an equal band: the first document of each group with every other one."""
    signed = np.flatnonzero(signatures.any(axis=1))
    pairs = []
    for band in np.split(np.arange(SIGNATURE), BANDS):
        keys = np.ascontiguousarray(signatures[signed][:, band]).view(np.dtype((np.void, 4 * len(band)))).ravel()
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        originals = first[inverse]
        repeated = originals != np.arange(len(signed))
        pairs.append(np.stack([signed[originals[repeated]], signed[repeated]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _sample(documents: np.ndarray) -> np.ndarray:
    return documents[:: max(1, -(-len(documents) // SAMPLE_DOCUMENTS))]


def _shared_prefix_tokens(store: TokenStore, documents: np.ndarray) -> int:
    """Returns the length of the prefix that an even sample of documents shares: system message and template."""
    sample = _sample(documents)
    return shared_prefix_tokens(store.tokens(sample), store.documents["length"][sample].astype(np.int64))


def _jaccard(store: TokenStore, first: int, second: int, skip: int) -> float:
    sets = []
    for document in (first, second):
        ids = np.asarray(store.ids[store.starts[document] + skip : store.starts[document + 1]])
        sets.append(set(shingles(ids, np.array([len(ids)]), NEAR_TOKENS)[0].tolist()))
    return len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1)


def overlapping_documents(store: TokenStore, train: np.ndarray, heldout: np.ndarray, *, share: float) -> np.ndarray:
    """Returns the training documents with at least ``share`` of their 13-grams in held-out rows."""
    table = _heldout_table(store, heldout, train=train)
    overlapping = [np.zeros(0, dtype=np.int64)]
    if table.any():
        for documents, hashes, counts in _batches(store, train):
            hashed = counts > 0
            if hashed.any():
                borders = (np.cumsum(counts) - counts)[hashed]
                hits = np.add.reduceat(table[_prefix(hashes)], borders, dtype=np.int64)
                overlapping.append(documents[hashed][hits >= share * counts[hashed]])
    return np.concatenate(overlapping)


def _heldout_table(store: TokenStore, heldout: np.ndarray, *, train: np.ndarray) -> np.ndarray:
    """Returns whether each hash prefix occurs in held-out rows; collisions are far rarer than the share that counts.

    Args:
        train: Training documents. A few held-out rows alone do not show which n-grams belong to the template.
    """
    hashes, rows = _ngrams(store, heldout)
    sample = _sample(train)
    train_hashes, train_rows = _ngrams(store, sample)
    common = train_hashes[train_rows > max(2, COMMON_SHARE * len(sample))]
    specific = (rows <= max(2, COMMON_SHARE * len(heldout))) & ~np.isin(hashes, common)
    table = np.zeros(1 << TABLE_BITS, dtype=bool)
    table[_prefix(hashes[specific])] = True
    return table


def _prefix(hashes: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(64 - TABLE_BITS)


def _ngrams(store: TokenStore, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of all n-grams, and the number of documents that contain each."""
    per_document = [
        np.unique(part)
        for _, hashes, counts in _batches(store, documents)
        for part in np.split(hashes, np.cumsum(counts)[:-1])
    ]
    return np.unique(np.concatenate(per_document or [np.zeros(0, np.uint64)]), return_counts=True)


def _batches(store: TokenStore, documents: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        batch = documents[start : start + BATCH_DOCUMENTS]
        hashes, counts = shingles(store.tokens(batch), store.documents["length"][batch], OVERLAP_TOKENS)
        yield batch, hashes, counts
