"""The rehearse group, and what a rehearsal leaves behind."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEVELS = ("quick", "off")


@dataclass(kw_only=True, slots=True)
class RehearseConfig:
    """How much is proved before training starts."""

    level: str
    """``quick`` runs every proof on one small batch, ``off`` none; a run without proofs says so in its report."""

    rows: int
    """Rows of the batch that the proofs use."""

    def problems(self) -> Iterator[str]:
        if self.level not in LEVELS:
            yield f"rehearse.level must be one of {', '.join(LEVELS)}; got {self.level!r}"
        if self.rows < 1:
            yield f"rehearse.rows must be at least 1; got {self.rows}"


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The proofs, in the order in which they ran.

    Attributes:
        folder: Holds trained_text.txt, the text that the first batch trains.
        proofs: ``{"name", "passed", "figure", "bound", "sentence", "seconds"}`` each.
        isolates: Whether documents side by side in one row do not read each other; taken as true where nothing is proved.
        quick: Whether quick steps give the gradient of plain ones; likewise.
    """

    folder: Path
    proofs: list[dict[str, Any]]
    isolates: bool
    quick: bool
