"""The train group."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune.jsonable import flatten
from finetune.objectives import OBJECTIVES, rows_mismatch
from finetune.train.grpo_config import GRPOConfig
from finetune.train.preference_config import PreferenceConfig
from finetune.train.preference_config import conflicts as preference_conflicts

AUTO = "auto"
CHECKPOINTING = (AUTO, "none", "selective", "full", "offloaded")
SELECT = ("last", "best")
NOT_IN_KEY = (
    "checkpoints",
    "save_steps",
    "keep_checkpoints",
    "log_steps",
    "non_finite_steps",
    "checkpointing",
)
"""Settings that leave the adapter as it is."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Training length, batch size and checkpointing."""

    epochs: float
    """Number of passes over the data; not used where ``steps`` is set."""

    steps: int | None
    """Number of optimizer steps; None trains for ``epochs``."""

    micro_batch: Any = AUTO  # a whole number or auto; OmegaConf 2.3 cannot merge unions into a missing group
    """Rows (packs, if packed) of one forward pass. Memory grows with it. ``auto`` takes the fastest that fits the
    device by the plan; what one optimizer step reads does not depend on it."""

    tokens_per_step: int | None
    """Approximate tokens that one optimizer step reads, by accumulating micro-batches. None: ``rows_per_step``."""

    rows_per_step: int | None
    """Rows (packs, if packed) that one optimizer step reads, where ``tokens_per_step`` is None."""

    checkpointing: str = AUTO
    """Activation checkpointing: ``none`` stores activations (fastest), ``full`` recomputes them in the backward pass
    (little memory), ``selective`` recomputes only the widest ones, those of gated MLPs. ``offloaded`` is ``full`` with
    what the layers keep in host memory: least memory on the device, for the longest rows; needs a GPU. ``auto`` takes
    the fastest that fits the device by the plan."""

    group_by_length: bool
    """Puts rows of similar length into one micro-batch, for less padding. Each step still reads the same rows."""

    neftune_alpha: float | None
    """Scale of the noise on the embeddings in training, which is ``alpha / sqrt(tokens * width)``; None for none.
    Source: NEFTune, arXiv 2310.05914, where 5 to 15 was used."""

    evaluations: int
    """Number of held-out evaluations during training, evenly spread; 0 for none."""

    eval_steps: int | None
    """Optimizer steps between two held-out evaluations, instead of ``evaluations``; None: ``evaluations`` counts."""

    evaluation_rows: int
    """Number of held-out rows per evaluation."""

    checkpoints: int
    """Number of checkpoints during training, evenly spread; 0 for none."""

    save_steps: int | None
    """Optimizer steps between two checkpoints, instead of ``checkpoints``; None: ``checkpoints`` counts."""

    keep_checkpoints: int
    """Number of newest checkpoints to keep on disk, besides the best one where ``select`` is ``best``."""

    select: str
    """Which adapter is the result: that of the ``last`` step, or of the ``best`` evaluation by held-out loss."""

    patience: int | None
    """Early stopping: ends after this many evaluations in a row without a lower held-out loss; None for never."""

    non_finite_steps: int
    """Number of steps in a row with a non-finite loss or gradient, each of them skipped, after which training stops."""

    log_steps: int
    """Number of optimizer steps between two points of the loss curve."""

    deterministic: bool
    """Requires deterministic kernels; slower on some GPUs."""

    objective: str = "sft"
    """``sft``: likelihood of each trained token. Chosen over rejected answers: ``dpo`` compared with a reference;
    ``orpo``, ``simpo`` and ``cpo`` without one. ``kto``: single answers, labelled desirable or undesirable.
    ``grpo``: answers that the model samples and rewards judge."""

    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Settings of the objectives that compare answers; not used by ``sft`` and ``grpo``."""

    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """Settings of ``grpo``: rewards, sampling and loss."""

    @property
    def micro_batch_rows(self) -> int:
        """Returns ``micro_batch`` as a number; `finetune.plan.step` replaces ``auto`` before training."""
        assert isinstance(self.micro_batch, int), f"train.micro_batch={self.micro_batch} was not resolved"
        return self.micro_batch

    @property
    def recomputes(self) -> bool:
        """Returns whether the backward pass computes whole layers again."""
        return self.checkpointing in ("full", "offloaded")

    @property
    def automatic(self) -> frozenset[str]:
        """Returns the names of the settings that the plan chooses."""
        return frozenset(name for name in ("micro_batch", "checkpointing") if getattr(self, name) == AUTO)

    @property
    def evaluates(self) -> bool:
        """Returns whether held-out rows are evaluated during training."""
        return bool(self.evaluations or self.eval_steps)

    @property
    def saves(self) -> bool:
        """Returns whether there are checkpoints."""
        return bool(self.checkpoints or self.save_steps)

    def key(self) -> dict[str, Any]:
        """Returns the settings that change the resulting adapter, by dotted names."""
        without = {*NOT_IN_KEY, *(name for name, _ in self.unused()), *([] if self.eval_steps else ["eval_steps"])}
        return {
            name: value
            for name, value in flatten(self).items()
            if name not in without and name.split(".")[0] not in without
        }

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        if self.steps is not None:
            yield "epochs", f"train.steps={self.steps} is set"
        for count, interval in (("evaluations", self.eval_steps), ("checkpoints", self.save_steps)):
            if interval is not None:
                yield count, f"train.{'eval' if count == 'evaluations' else 'save'}_steps={interval} is set"
        yield from self.preference.unused_by(self.objective)
        if not OBJECTIVES[self.objective].samples:
            yield "grpo", f"train.objective={self.objective} samples no answers"

    def problems(self) -> Iterator[str]:
        if self.steps is None and self.epochs <= 0:
            yield f"train.epochs must be positive, or train.steps set; got {self.epochs}"
        if self.steps is not None and self.steps < 1:
            yield f"train.steps must be at least 1; got {self.steps}"
        if self.micro_batch != AUTO and (type(self.micro_batch) is not int or self.micro_batch < 1):
            yield f"train.micro_batch must be a whole number of at least 1, or {AUTO}; got {self.micro_batch}"
        for key in ("log_steps", "keep_checkpoints", "evaluation_rows", "non_finite_steps"):
            if getattr(self, key) < 1:
                yield f"train.{key} must be at least 1; got {getattr(self, key)}"
        if (self.tokens_per_step is None) == (self.rows_per_step is None):
            yield (
                "train.tokens_per_step and train.rows_per_step both set how much one step reads: set one and leave the "
                f"other null; got {self.tokens_per_step} and {self.rows_per_step}"
            )
        for key in ("tokens_per_step", "rows_per_step", "eval_steps", "save_steps"):
            if (value := getattr(self, key)) is not None and value < 1:
                yield f"train.{key} must be at least 1; got {value}"
        for key in ("evaluations", "checkpoints"):
            if getattr(self, key) < 0:
                yield f"train.{key} must be 0 (never) or more; got {getattr(self, key)}"
        for key, allowed in (("checkpointing", CHECKPOINTING), ("select", SELECT), ("objective", tuple(OBJECTIVES))):
            if (value := getattr(self, key)) not in allowed:
                yield f"train.{key} must be one of {', '.join(allowed)}; got {value!r}"
        if self.patience is not None and self.patience < 1:
            yield f"train.patience must be at least 1, or null for never; got {self.patience}"
        if self.neftune_alpha is not None and self.neftune_alpha <= 0:
            yield f"train.neftune_alpha must be positive, or null for no noise; got {self.neftune_alpha}"
        if not self.evaluates:
            for key, needs in (("patience", self.patience is not None), ("select", self.select == "best")):
                if needs:
                    yield (
                        f"train.{key}={getattr(self, key)} needs the held-out loss, which train.evaluations=0 never "
                        "computes; set train.evaluations=4"
                    )
        yield from self.preference.problems(self.objective)
        yield from self._sampling_problems()

    def _sampling_problems(self) -> Iterator[str]:
        """Yields problems of an objective that samples its answers."""
        objective = OBJECTIVES.get(self.objective)
        sampled = objective is not None and objective.samples
        yield from self.grpo.problems(sampled=sampled)
        if sampled and self.rows_per_step is None:
            yield (
                "train.tokens_per_step cannot set the size of a step whose answers are sampled; set "
                "train.tokens_per_step=null train.rows_per_step=8, which counts prompts"
            )
        if sampled and (self.select == "best" or self.patience is not None):
            yield (
                f"train.select={self.select} and train.patience={self.patience} use the held-out loss, which "
                "train.objective=grpo has none of; set train.select=last train.patience=null"
            )

    def conflicts(self, *, rows: str, variant: str, dropout: float, launch: str) -> Iterator[str]:
        """Yields problems with settings of other groups.

        Args:
            rows: ``data.objective``.
            variant: ``lora.variant``.
            dropout: ``lora.dropout``.
            launch: ``launch.strategy``.
        """
        if self.objective in OBJECTIVES:
            yield from rows_mismatch(self.objective, rows)
            yield from preference_conflicts(
                self.objective, variant=variant, dropout=dropout, neftune_alpha=self.neftune_alpha, launch=launch
            )
