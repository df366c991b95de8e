"""Hashes token n-grams and computes MinHash signatures, for many documents at once."""

import numpy as np

BASE = np.uint64(0x9E3779B97F4A7C15)
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))
NEAR_TOKENS, OVERLAP_TOKENS = 5, 13
"""5-grams for near duplicates and 13-grams for leakage: the lengths of SlimPajama and of GPT-3's appendix C."""
SIGNATURE = 16
BANDS = 4


def shingles(ids: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes every n-gram of ``size`` tokens inside a document.

    Args:
        ids: Tokens of all documents, one after the other.
        lengths: Tokens of each document.

    Returns:
        The hashes, and the number of each document's hashes.

    The polynomial hash comes from a running sum, so the cost does not depend on ``size``.
    """
    counts = np.maximum(lengths.astype(np.int64) - size + 1, 0)
    if not counts.any():
        return np.zeros(0, np.uint64), counts
    with np.errstate(over="ignore"):
        powers = np.full(len(ids), BASE, dtype=np.uint64)
        powers[0] = 1
        np.cumprod(powers, out=powers)
        sums = np.zeros(len(ids) + 1, dtype=np.uint64)
        np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * powers, out=sums[1:])
        back = np.full(len(ids), INVERSE, dtype=np.uint64)
        back[0] = 1
        np.cumprod(back, out=back)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        index = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        x = (sums[index + size] - sums[index]) * back[index]
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        return x ^ (x >> np.uint64(29)), counts


def signatures(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the MinHash signature of every document; zeros for short ones.

    The prefix that all documents of the call share, such as a system message, is left out. Source: Broder, 1997.
    """
    result = np.zeros((len(lengths), SIGNATURE), dtype=np.uint32)
    skip = shared_prefix_tokens(ids, lengths)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    rest = lengths - skip
    index = np.arange(rest.sum()) + np.repeat(starts + skip - (np.cumsum(rest) - rest), rest)
    hashes, counts = shingles(ids[index], rest, NEAR_TOKENS)
    hashed = counts > 0
    if not hashed.any():
        return result
    borders = (np.cumsum(counts) - counts)[hashed]
    multipliers = np.random.default_rng(7).integers(1, 2**63, SIGNATURE, dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        for number, multiplier in enumerate(multipliers):
            values = (hashes * multiplier >> np.uint64(32)).astype(np.uint32)
            result[hashed, number] = np.minimum.reduceat(values, borders)
    return result


def shared_prefix_tokens(ids: np.ndarray, lengths: np.ndarray) -> int:
    """Returns the length of the prefix that all documents share; 0 for a single document."""
    if len(lengths) < 2:
        return 0
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    shortest = int(lengths.min())
    prefixes = ids[starts[:, None] + np.arange(shortest)]
    same = (prefixes == prefixes[0]).all(axis=0)
    return shortest if same.all() else int(np.argmin(same))
