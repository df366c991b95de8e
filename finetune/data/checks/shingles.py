"""Runs of tokens as numbers, for whole batches at once."""

import numpy as np

BASE = np.uint64(0x9E3779B97F4A7C15)
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))
NEAR_TOKENS, OVERLAP_TOKENS = 5, 13
"""5-grams for near duplicates, 13-grams for leakage: the lengths of SlimPajama and of GPT-3's appendix C."""
SIGNATURE = 16
BANDS = 4
BLANK = np.uint64(2**64 - 1)


def shingles(ids: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A hash for every run of ``size`` tokens that lies in one document.

    Args:
        ids: Tokens of all documents, one after the other.
        lengths: Tokens of each document.

    Returns:
        The hashes, and how many belong to each document.

    The polynomial is taken from a running sum, so the cost does not depend on ``size``.
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
    """MinHash of every document without the beginning that all share (a system message, say); zeros for short ones.

    Source: Broder, 1997. The documents of one call share their beginning; calls should be large.
    """
    result = np.zeros((len(lengths), SIGNATURE), dtype=np.uint32)
    skip = shared_beginning(ids, lengths)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    rest = lengths - skip
    index = np.arange(rest.sum()) + np.repeat(starts + skip - (np.cumsum(rest) - rest), rest)
    hashes, counts = shingles(ids[index], rest, NEAR_TOKENS)
    there = counts > 0
    if not there.any():
        return result
    borders = (np.cumsum(counts) - counts)[there]
    multipliers = np.random.default_rng(7).integers(1, 2**63, SIGNATURE, dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        for number, multiplier in enumerate(multipliers):
            result[there, number] = np.minimum.reduceat(
                (hashes * multiplier >> np.uint64(32)).astype(np.uint32), borders
            )
    return result


def shared_beginning(ids: np.ndarray, lengths: np.ndarray) -> int:
    if len(lengths) < 2:
        return 0
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    shortest = int(lengths.min())
    heads = ids[starts[:, None] + np.arange(shortest)]
    same = (heads == heads[0]).all(axis=0)
    return shortest if same.all() else int(np.argmin(same))
