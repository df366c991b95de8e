"""Describes the lengths of rows, and what each limit would cut, to help choose ``data.max_tokens``."""

from collections.abc import Iterator
from typing import Any

import numpy as np

QUANTILES = (50, 90, 95, 99)
THRESHOLDS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BINS = 24
HISTOGRAM_END = 2
"""The histogram ends at this multiple of the 99th percentile."""


def length_statistics(chunks: Iterator[tuple[np.ndarray, np.ndarray]], *, max_tokens: int) -> dict[str, Any]:
    """Computes quantiles, a histogram, and the share that each limit would cut.

    Args:
        chunks: Tokens of readable rows, before any row is cut or dropped for its length, and their trained tokens.

    Returns:
        ``quantiles``, ``longest``, ``histogram`` (``edges`` and ``rows``; the last bin includes longer rows) and
        ``thresholds``: for each limit, the share of longer rows and their share of all trained tokens.
    """
    lengths, rows, trained = _by_length(chunks)
    if not len(lengths):
        return {"quantiles": {}, "longest": 0, "histogram": {"edges": [], "rows": []}, "thresholds": []}
    longest, count = int(lengths[-1]), int(rows.sum())
    # Row number ceil(share * (count - 1)) of the sorted lengths is numpy's percentile with method="higher".
    at = np.searchsorted(np.cumsum(rows), np.ceil((count - 1) * (np.array(QUANTILES) / 100)), side="right")
    quantiles = dict(zip(QUANTILES, lengths[at].tolist(), strict=True))
    # A few very long rows would squeeze all others into one bar, so they share the last bin.
    top = min(longest, max(HISTOGRAM_END * quantiles[99], max_tokens))
    bars, edges = np.histogram(np.minimum(lengths, top), bins=min(BINS, max(1, top)), range=(0, top), weights=rows)
    limits = sorted({*[threshold for threshold in THRESHOLDS if threshold < longest], max_tokens})
    total = max(int(trained.sum()), 1)
    return {
        "quantiles": {f"p{share}": length for share, length in quantiles.items()},
        "longest": longest,
        "histogram": {"edges": [round(float(edge), 1) for edge in edges], "rows": bars.astype(int).tolist()},
        "thresholds": [
            {
                "max_tokens": threshold,
                "rows_share": round(float(rows[lengths > threshold].sum() / count), 6),
                "trained_tokens_share": round(float(trained[lengths > threshold].sum() / total), 6),
            }
            for threshold in limits
        ],
    }


def _by_length(chunks: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the different lengths, the rows of each, and the trained tokens of these."""
    lengths = rows = trained = np.zeros(0, np.int64)
    for more_lengths, more_trained in chunks:
        joined = np.concatenate([lengths, more_lengths])
        lengths, at = np.unique(joined, return_inverse=True)
        counts = np.concatenate([rows, np.ones(len(more_lengths), np.int64)])
        sums = np.concatenate([trained, more_trained.astype(np.int64)])
        rows, trained = np.zeros((2, len(lengths)), np.int64)
        np.add.at(rows, at, counts)
        np.add.at(trained, at, sums)
    return lengths, rows, trained
