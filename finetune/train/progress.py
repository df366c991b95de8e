"""How far training has come: kept in every checkpoint, so that a resumed run progress on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(slots=True)
class TrainingProgress:
    """What a run knows about itself beside its weights.

    Attributes:
        tokens: Read, padding left out.
        trained: Those that made loss.
        seconds: Time in the training loop, processes before this one included.
        skipped: Steps that were not taken because their loss or gradient was no number.
        skipped_in_a_row: Those of them since the last step that was taken.
        evaluations: Times that the held-out loss was taken.
        best_step: The step with the lowest held-out loss; 0 before the first evaluation.
        best_loss: That loss, in nats per trained token; None before the first evaluation.
        waited: Evaluations since then.
        stopped_early: Whether ``train.patience`` has ended the training.
        narrowed: The fields of the train group that running out of memory has changed.
    """

    tokens: int = 0
    trained: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluations: int = 0
    best_step: int = 0
    best_loss: float | None = None
    waited: int = 0
    stopped_early: bool = False
    narrowed: dict[str, int] = dataclasses.field(default_factory=dict)

    def copy(self) -> TrainingProgress:
        """The same figures in an object of their own."""
        return dataclasses.replace(self, narrowed=dict(self.narrowed))

    def take(self, other: TrainingProgress) -> None:
        """Goes back, or on, to the figures of another."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))
