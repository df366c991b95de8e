"""Ends the int8 range of a layer's inputs in several ways, and measures what each loses in the layer's output.

A static range is chosen on some tokens and used on others; a dynamic one is taken from the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 127
BINS, LEVEL_BINS, STRIDE = 2048, 128, 16
"""Bins of the histogram, bins that one side of int8 has room for, and the step of the search. Source of the first two:
Migacz 2017, 8-bit Inference with TensorRT."""

PERCENTILE = 99.9
SHRUNK = 40
"""Candidates for the range with the smallest squared error: fortieths of the largest value."""


def absmax(values: Tensor) -> float:
    """Returns the largest absolute value: nothing is cut off."""
    return float(values.abs().max())


def percentile(values: Tensor) -> float:
    """Returns the end of a range that cuts off the largest thousandth of the values."""
    return float(np.percentile(values.abs().numpy(), PERCENTILE))


def smallest_square(values: Tensor) -> float:
    """Returns the end of the range whose rounding has the smallest squared error."""
    largest = absmax(values)
    candidates = [largest * number / SHRUNK for number in range(1, SHRUNK + 1)]
    return min(candidates, key=lambda end: float((values - int8(values, end)).square().sum()))


def entropy(values: Tensor) -> float:
    """Returns the end of the range whose rounding keeps the distribution nearest, by the KL divergence.

    Source: Migacz 2017, 8-bit Inference with TensorRT, slides 32 to 34.
    """
    counts, edges = np.histogram(values.abs().numpy(), bins=BINS)
    ends = range(LEVEL_BINS, BINS + 1, STRIDE)
    return float(edges[min(ends, key=lambda end: _divergence(counts, end))])


def _divergence(counts: np.ndarray, end: int) -> float:
    """Returns KL(P || Q): P is the histogram up to ``end`` with the rest in its last bin, Q is P in 128 levels."""
    clipped = counts[:end].astype(float)
    level = np.arange(end) * LEVEL_BINS // end
    filled = clipped > 0
    sums = np.bincount(level, weights=clipped, minlength=LEVEL_BINS)
    bins = np.bincount(level, weights=filled.astype(float), minlength=LEVEL_BINS)
    q = np.where(filled, sums[level] / np.maximum(bins[level], 1), 0.0)
    p = clipped
    p[-1] += counts[end:].sum()
    p, q = p / p.sum(), q / max(q.sum(), 1.0)
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())


STATIC: dict[str, Callable[[Tensor], float]] = {
    "static, largest value": absmax,
    "static, 99.9th percentile": percentile,
    "static, smallest squared error": smallest_square,
    "static, entropy": entropy,
}


def int8(values: Tensor, end: float | Tensor) -> Tensor:
    """Rounds to int8, symmetric, and back; values beyond ``end`` are cut off."""
    scale = end / LEVELS
    return (values / scale).round().clamp(-LEVELS, LEVELS) * scale


def output_errors(seen: Tensor, weight: Tensor) -> dict[str, float]:
    """Returns the relative error of a layer's output with inputs in int8 and exact weights, by how the range ends.

    Args:
        seen: What the layer read, shape (tokens, inputs). Static ranges are chosen on the first half of the tokens;
            everything is measured on the second one.
        weight: Shape (outputs, inputs).
    """
    x = seen.float()
    chosen_on, measured_on = x[: len(x) // 2], x[len(x) // 2 :]
    exact = measured_on @ weight.T
    ends: dict[str, float | Tensor] = {name: find(chosen_on) for name, find in STATIC.items()}
    ends["dynamic, one for all tokens"] = absmax(measured_on)
    ends["dynamic, one per token"] = measured_on.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return {
        name: float((int8(measured_on, end) @ weight.T - exact).norm() / exact.norm()) for name, end in ends.items()
    }
