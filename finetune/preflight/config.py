"""The rehearse group, what the run is about to do, and what a rehearsal leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LEVELS = ("quick", "full", "off")


@dataclass(kw_only=True, slots=True)
class PreflightConfig:
    """How much is proved before training starts."""

    level: str
    """``quick``: the cheap proofs on one small batch. ``full``: all of them, on the largest batch that training will see, with
    some steps on it. ``off``: none; the run's report says so."""

    rows: int
    """Documents of the small batch, and micro-batches that are accumulated."""

    steps: int
    """``full`` only: optimizer steps on one repeated batch at most; it stops as soon as the answers and their ends are learnt."""

    def problems(self) -> Iterator[str]:
        if self.level not in LEVELS:
            yield f"preflight.level must be one of {', '.join(LEVELS)}; got {self.level!r}"
        if self.rows < 2:
            yield f"preflight.rows must be at least 2, or there is nothing to pack or to accumulate; got {self.rows}"
        if self.steps < 1:
            yield f"preflight.steps must be at least 1; got {self.steps}"
