"""How long rows are, and what each threshold would cut: so that ``data.max_tokens`` can be chosen."""

from typing import Any

import numpy as np

QUANTILES = (50, 90, 95, 99)
THRESHOLDS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BINS = 24
FARTHEST = 2
"""The histogram ends at this many times the length that 99 % of the rows keep to."""


def measure(tokens: np.ndarray, trained: np.ndarray, *, max_tokens: int) -> dict[str, Any]:
    """Of all readable rows, before anything was cut or dropped for its length.

    Args:
        tokens: Tokens of each row.
        trained: Trained tokens of each row.

    Returns:
        ``quantiles``, ``longest``, ``histogram`` (``edges`` and ``rows``; the last bin holds what is longer too), and ``thresholds``:
        for each, the share of rows that are longer, and the share of all trained tokens that lie in them.
    """
    if not len(tokens):
        return {"quantiles": {}, "longest": 0, "histogram": {"edges": [], "rows": []}, "thresholds": []}
    longest = int(tokens.max())
    # A few very long rows would press all others into one bar, so they share the last one.
    top = min(longest, max(FARTHEST * int(np.percentile(tokens, 99, method="higher")), max_tokens))
    rows, edges = np.histogram(np.minimum(tokens, top), bins=min(BINS, max(1, top)), range=(0, top))
    wanted = sorted({*[threshold for threshold in THRESHOLDS if threshold < longest], max_tokens})
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
            for threshold in wanted
        ],
    }
