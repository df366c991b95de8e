"""What exports and their card read of the products of the stages before."""

from typing import Any, Protocol

from finetune.measure.stage import StageProduct


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


class MergedFacts(StageProduct, Protocol):
    """What the card says about the merge."""

    @property
    def chosen(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def reference(self) -> dict[str, Any]: ...
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
