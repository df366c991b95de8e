"""Finds near duplicates, and training documents that overlap with held-out ones."""

from collections import Counter
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
    pairs = store.collect(_candidate_pairs(store, documents)).reshape(-1, 2)
    if not len(pairs):
        return 0.0
    checked = np.array(pairs[:: max(1, -(-len(pairs) // LARGEST_CHECKED_PAIRS))])
    skip = _shared_prefix_tokens(store, documents)
    near = np.array([_jaccard(store, pair, skip) >= similarity for pair in checked])
    rows = len(np.unique(checked[near, 1])) * len(pairs) / len(checked)
    return min(rows / len(documents), 1.0)


def _candidate_pairs(store: TokenStore, documents: np.ndarray) -> Iterator[np.ndarray]:
    """Yields pairs with an equal band, of shape (pairs, 2): the first document of each group with every other one."""
    with store.keys() as pairs:
        for band in np.split(np.arange(SIGNATURE), BANDS):
            with store.keys() as bands:
                for part in store.slices(len(documents)):
                    signatures = store.signatures[documents[part]]
                    signed = signatures.any(axis=1)
                    halves = np.ascontiguousarray(signatures[signed][:, band]).view(np.uint64)
                    bands.add(documents[part][signed], halves[:, 0], halves[:, 1])
                for originals, repeats in bands.repeats():
                    pairs.add(repeats, originals, repeats)
        for originals, repeats, _ in pairs.groups():
            yield np.stack([originals, repeats], axis=1)


def _sample(documents: np.ndarray) -> np.ndarray:
    return documents[:: max(1, -(-len(documents) // SAMPLE_DOCUMENTS))]


def _shared_prefix_tokens(store: TokenStore, documents: np.ndarray) -> int:
    """Returns the length of the prefix that an even sample of documents shares: system message and template."""
    sample = _sample(documents)
    return shared_prefix_tokens(store.tokens(sample), store.documents["length"][sample].astype(np.int64))


def _jaccard(store: TokenStore, pair: np.ndarray, skip: int) -> float:
    sets = []
    for document in pair:
        ids = store.tokens(np.array([document]))[skip:]
        sets.append(set(shingles(ids, np.array([len(ids)]), NEAR_TOKENS)[0].tolist()))
    return len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1)


def overlapping_documents(
    store: TokenStore, train: np.ndarray, heldout: np.ndarray, *, share: float
) -> Iterator[np.ndarray]:
    """Yields the training documents with at least ``share`` of their 13-grams in held-out rows."""
    table = _heldout_table(store, heldout, train=train)
    if not table.any():
        return
    for documents, hashes, counts in _batches(store, train):
        hashed = counts > 0
        if hashed.any():
            borders = (np.cumsum(counts) - counts)[hashed]
            hits = np.add.reduceat(table[_prefix(hashes)], borders, dtype=np.int64)
            yield documents[hashed][hits >= share * counts[hashed]]


def _heldout_table(store: TokenStore, heldout: np.ndarray, *, train: np.ndarray) -> np.ndarray:
    """Returns whether each hash prefix occurs in held-out rows; collisions are far rarer than the share that counts.

    Args:
        train: Training documents. A few held-out rows alone do not show which n-grams belong to the template.
    """
    common = np.concatenate([_common_ngrams(store, documents) for documents in (heldout, _sample(train))])
    table = np.zeros(1 << TABLE_BITS, dtype=bool)
    for hashes in _ngrams(store, heldout):
        table[_prefix(hashes[~np.isin(hashes, common)])] = True
    return table


def _prefix(hashes: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(64 - TABLE_BITS)


def _common_ngrams(store: TokenStore, documents: np.ndarray) -> np.ndarray:
    """Returns the hashes of the n-grams that are in too many of the documents to belong to one.

    Those whose prefix is rare are rare too, so only the few others are counted one by one.
    """
    most = max(2, COMMON_SHARE * len(documents))
    of_prefix = np.zeros(1 << TABLE_BITS, dtype=np.int32)
    for hashes in _ngrams(store, documents):
        np.add.at(of_prefix, _prefix(hashes), 1)
    counts = Counter[int]()
    for hashes in _ngrams(store, documents):
        counts.update(hashes[of_prefix[_prefix(hashes)] > most].tolist())
    return np.array([hashed for hashed, count in counts.items() if count > most], dtype=np.uint64)


def _ngrams(store: TokenStore, documents: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the hashes of all n-grams, each once for every document that contains it."""
    for _, hashes, counts in _batches(store, documents):
        parts = np.split(hashes, np.cumsum(counts)[:-1])
        yield np.concatenate([np.unique(part) for part in parts])


def _batches(store: TokenStore, documents: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for part in store.slices(len(documents), BATCH_DOCUMENTS):
        batch = documents[part]
        hashes, counts = shingles(store.tokens(batch), store.documents["length"][batch], OVERLAP_TOKENS)
        yield batch, hashes, counts
