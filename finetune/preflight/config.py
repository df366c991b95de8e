"""The rehearse group, what the run is about to do, and what a rehearsal leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from finetune.model import ModelConfig
    from finetune.optim import OptimConfig
    from finetune.quantization import QuantizationConfig
    from finetune.train import TrainConfig

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


class UpcomingRun(NamedTuple):
    """What the run is about to do. No dataclass on purpose: `RunFolder.once` would hold a finished rehearsal against each of
    its settings, and the stages that use them refuse a change themselves.

    Attributes:
        train: The train group.
        optim: The optim group.
        model: The model group.
        quantization: The quantization group.
        until: ``run.until``.
        make_trainer: ``finetune.train.trainer.make_trainer``: what is rehearsed is the trainer that will train.
    """

    train: TrainConfig
    optim: OptimConfig
    model: ModelConfig
    quantization: QuantizationConfig
    until: str
    make_trainer: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class PreflightResult:
    """The proofs, in the order in which they ran.

    Attributes:
        folder: Holds trained_text.txt, the text that the first batch trains.
        proofs: ``{"name", "passed", "figure", "bound", "sentence", "cause", "seconds"}`` each.
        isolates: Whether documents side by side in one row do not read each other; taken as true where nothing is proved.
        quick: Whether quick steps give the gradient of plain ones; likewise.
        left_out: ``{"name", "sentence", "why"}`` of each proof that did not run.
        seconds: What the rehearsal cost.
        training_seconds: What the training will take, about; None where no gradient was timed.
        day: When it ran: before this run, where the very same was proved already.
    """

    folder: Path
    proofs: list[dict[str, Any]]
    isolates: bool
    quick: bool
    left_out: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    training_seconds: float | None = None
    day: str = ""
