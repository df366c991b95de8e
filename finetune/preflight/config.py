"""The preflight group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LEVELS = ("quick", "full", "off")


@dataclass(kw_only=True, slots=True)
class PreflightConfig:
    """How much is checked before training starts."""

    level: str
    """``quick``: the cheap checks on one small batch. ``full``: all checks, on the largest batch of the training, with
    some optimizer steps on it. ``off``: none; the run's report says so."""

    rows: int
    """Documents of the small batch, and micro-batches that are accumulated."""

    steps: int
    """``full`` only: upper limit on the optimizer steps on one repeated batch. The steps stop as soon as the loss has
    fallen and generation stops after every answer."""

    def problems(self) -> Iterator[str]:
        """Yields every setting that makes no sense."""
        if self.level not in LEVELS:
            yield f"preflight.level must be one of {', '.join(LEVELS)}; got {self.level!r}"
        if self.rows < 2:
            yield f"preflight.rows must be at least 2, or there is nothing to pack or to accumulate; got {self.rows}"
        if self.steps < 1:
            yield f"preflight.steps must be at least 1; got {self.steps}"
