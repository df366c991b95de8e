"""How far training has come: saved in every checkpoint, so that a resumed run continues from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(slots=True)
class TrainingProgress:
    """The state of a run other than its weights.

    Attributes:
        tokens: Tokens read, without padding.
        trained: Tokens trained on.
        seconds: Time in the training loop, that of earlier processes of the run included.
        skipped: Steps that were skipped because their loss or gradient was non-finite.
        skipped_in_a_row: Steps that were skipped since the last step that was taken.
        evaluations: Held-out evaluations.
        best_step: The step with the lowest held-out loss; 0 before the first evaluation.
        best_loss: That loss, in nats per trained token; None before the first evaluation.
        waited: Evaluations since ``best_step``.
        stopped_early: Whether ``train.patience`` has ended the training.
        narrowed: Fields of the train group that an out-of-memory retry has changed.
        sampling_rows: Answers in a batch of sampling that memory sufficed for; None for those of the settings.
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
    sampling_rows: int | None = None

    def copy(self) -> TrainingProgress:
        """Returns an independent copy."""
        return dataclasses.replace(self, narrowed=dict(self.narrowed))

    def take(self, other: TrainingProgress) -> None:
        """Replaces every figure by that of ``other``."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))
