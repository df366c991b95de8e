"""What exports and their card read of the products of the stages before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.inference.stage import StageProduct

if TYPE_CHECKING:
    from finetune.inference.generation import Answer
    from finetune.inference.losses import RowLoss


class AnswerSettings(Protocol):
    """How the models before were measured."""

    max_new_tokens: int
    batch_rows: int
    batch_tokens: int


class Rules(Protocol):
    """The evaluation's, and what it measured."""

    @property
    def config(self) -> AnswerSettings: ...
    def losses(self, artifact: str, *, rows: int) -> list[RowLoss]: ...
    def beside(
        self, artifact: str, answers: Sequence[Answer], *, heldout: Path, tokenizer: Any, file: Path
    ) -> dict[str, Any]: ...


class TrainedFacts(StageProduct, Protocol):
    """What the card says about the training."""

    @property
    def steps(self) -> int: ...
    @property
    def trained_tokens(self) -> int: ...
    @property
    def trainable_parameters(self) -> int: ...
    @property
    def optimizer(self) -> dict[str, Any]: ...


class DataFacts(StageProduct, Protocol):
    """What the card says about the data."""

    @property
    def train_rows(self) -> int: ...
    @property
    def heldout_rows(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def trained_tokens(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def sources(self) -> list[str]: ...


class MergedFacts(StageProduct, Protocol):
    """What the card says about the merge."""

    @property
    def chosen(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def loss_rows(self) -> int: ...
    @property
    def candidates(self) -> list[dict[str, Any]]: ...
    @property
    def adapters(self) -> dict[str, float]: ...


class ScoreFacts(StageProduct, Protocol):
    """What the card says about quality."""

    @property
    def artifacts(self) -> dict[str, dict[str, Any]]: ...
    @property
    def changes(self) -> dict[str, dict[str, dict[str, float]]]: ...
    @property
    def rows(self) -> int: ...
    @property
    def loss_rows(self) -> int: ...
