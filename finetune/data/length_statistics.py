"""Describes the lengths of rows, and what each limit would cut, to help choose ``data.max_tokens``."""

from typing import Any

import numpy as np

QUANTILES = (50, 90, 95, 99)
THRESHOLDS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BINS = 24
HISTOGRAM_END = 2
"""The histogram ends at this multiple of the 99th percentile."""


def length_statistics(tokens: np.ndarray, trained: np.ndarray, *, max_tokens: int) -> dict[str, Any]:
    """Computes quantiles, a histogram, and the share that each limit would cut.

    Args:
        tokens: Tokens of each readable row, before any row is cut or dropped for its length.
        trained: Trained tokens of each row.

    Returns:
        ``quantiles``, ``longest``, ``histogram`` (``edges`` and ``rows``; the last bin includes longer rows) and
        ``thresholds``: for each limit, the share of longer rows and their share of all trained tokens.
    """
    if not len(tokens):
        return {"quantiles": {}, "longest": 0, "histogram": {"edges": [], "rows": []}, "thresholds": []}
    longest = int(tokens.max())
    # A few very long rows would squeeze all others into one bar, so they share the last bin.
    top = min(longest, max(HISTOGRAM_END * int(np.percentile(tokens, 99, method="higher")), max_tokens))
    rows, edges = np.histogram(np.minimum(tokens, top), bins=min(BINS, max(1, top)), range=(0, top))
    limits = sorted({*[threshold for threshold in THRESHOLDS if threshold < longest], max_tokens})
    total = max(int(trained.sum()), 1)
    return {
        "quantiles": {f"p{share}": int(np.percentile(tokens, share, method="higher")) for share in QUANTILES},
        "longest": longest,
        "histogram": {"edges": [round(float(edge), 1) for edge in edges], "rows": rows.tolist()},
        "thresholds": [
            {
                "max_tokens": threshold,
                "rows_share": round(float((tokens > threshold).mean()), 6),
                "trained_tokens_share": round(float(trained[tokens > threshold].sum() / total), 6),
            }
            for threshold in limits
        ],
    }
