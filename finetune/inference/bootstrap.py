"""Computes intervals by resampling rows, with the same resamples for every artifact, so that differences are paired.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile intervals).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from finetune.scores import Difference, Interval, LossScores

if TYPE_CHECKING:
    from finetune.inference.losses import RowLoss

LOW, HIGH = 2.5, 97.5
"""Percentiles of a 95 % interval."""

RESAMPLES = 2000
"""Default. Efron and Tibshirani, chapter 13, ask for 1000 or more."""

BLOCK_CELLS = 4_000_000
"""Resample counts in memory at a time: 32 MB."""

LARGEST_EXPONENT = 700.0
"""exp of a larger number overflows float64."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of sums: the mean if the weights are 1, the loss per token if they are token counts.

    Attributes:
        totals: Per row, shape (rows,).
        weights: Per row, shape (rows,).
    """

    totals: ndarray
    weights: ndarray

    def of(self, counts: ndarray) -> ndarray:
        """Returns the ratio in each resample; counts has shape (resamples, rows)."""
        weight = counts @ self.weights
        return np.divide(counts @ self.totals, weight, out=np.full(len(weight), np.nan), where=weight > 0)

    @property
    def value(self) -> float:
        return float(self.of(np.ones((1, len(self.totals))))[0])


def perplexity(loss: ndarray) -> ndarray:
    """Returns exp(loss), of a loss low enough not to overflow."""
    return np.exp(np.minimum(loss, LARGEST_EXPONENT))


def token_loss(rows: Sequence[RowLoss]) -> Ratio:
    """Returns nats per trained token; every token has the same weight."""
    totals = np.array([row.loss for row in rows], dtype=float)
    return Ratio(totals=totals, weights=np.array([row.tokens for row in rows], dtype=float))


def mean_of(values: list[float]) -> Ratio:
    """Returns the mean over rows."""
    return Ratio(totals=np.asarray(values, dtype=float), weights=np.ones(len(values)))


class Bootstrap:
    """Resamples rows, with the same resamples for every figure.

    Args:
        rows: Number of rows of the evaluation.
        samples: Number of resamples.
        seed: Of the generator.
    """

    def __init__(self, rows: int, *, samples: int, seed: int) -> None:
        self.rows, self.samples, self.seed = rows, samples, seed

    def level(self, figure: Ratio, *, shape: Callable[[ndarray], ndarray] = np.asarray) -> Interval:
        """Returns one artifact's figure; ``shape`` transforms it (loss into perplexity)."""
        value = float(shape(np.array([figure.value]))[0])
        return _interval(value, shape(self._resampled(figure)))

    def difference(
        self, before: Ratio, after: Ratio, *, shape: Callable[[ndarray], ndarray] = np.asarray
    ) -> Difference:
        """Returns after minus before, on the same rows in each resample."""
        value = float((shape(np.array([after.value])) - shape(np.array([before.value])))[0])
        interval = _interval(value, shape(self._resampled(after)) - shape(self._resampled(before)))
        return Difference(difference=interval.value, low=interval.low, high=interval.high)

    def loss(self, figure: Ratio) -> LossScores:
        """Returns the figures of a `token_loss` that every artifact reports."""
        level = self.level(figure)
        return LossScores(
            loss=level.value,
            loss_low=level.low,
            loss_high=level.high,
            perplexity=float(perplexity(np.array(level.value))),
            tokens=int(figure.weights.sum()),
        )

    def _resampled(self, figure: Ratio) -> ndarray:
        generator = np.random.default_rng(self.seed)
        step = max(1, BLOCK_CELLS // max(self.rows, 1))
        parts = []
        for start in range(0, self.samples, step):
            size = min(step, self.samples - start)
            counts = generator.multinomial(self.rows, np.full(self.rows, 1 / self.rows), size=size).astype(float)
            parts.append(figure.of(counts))
        return np.concatenate(parts)


def _interval(value: float, resampled: ndarray) -> Interval:
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return Interval(value=value, low=value, high=value)
    low, high = np.percentile(finite, [LOW, HIGH])
    return Interval(value=value, low=float(low), high=float(high))
