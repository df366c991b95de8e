"""The train group, and what training leaves behind."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.train.preference import PreferenceConfig
from finetune.train.preference import conflicts as preference_conflicts

CHECKPOINTING = ("none", "selective", "full")
KEEP = ("last", "best")
OBJECTIVES = {"sft": "supervised", "dpo": "preference"}
"""What may be learnt, and the ``data.objective`` whose rows it reads. KTO, ORPO and GRPO would be further lines."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How long, in which portions, and what is kept on the way."""

    epochs: float
    """Times over the data; not used where ``steps`` is set."""

    steps: int | None
    """Optimizer steps; None trains for ``epochs``."""

    micro_batch: int
    """Rows (or packs) that go through the model at once. Costs memory."""

    tokens_per_step: int | None
    """Tokens that one optimizer step reads, about; micro-batches are accumulated up to it. None: ``rows_per_step``."""

    rows_per_step: int | None
    """Rows (or packs) that one optimizer step reads, where ``tokens_per_step`` is None."""

    checkpointing: str
    """Activations: ``none`` keeps them (fast), ``full`` computes them again in the backward pass (small),
    ``selective`` only the widest, those of gated layers."""

    offload: bool
    """Keeps activations in the machine's memory instead of the GPU's; only with a GPU. Slower, and room for longer rows."""

    group_by_length: bool
    """Puts rows of like length into one micro-batch, so that less is padded. No step reads other rows for it."""

    neftune_alpha: float | None
    """Noise on the embeddings while training, ``alpha / sqrt(tokens * width)`` wide; None for none.
    Source: NEFTune, arXiv 2310.05914, where 5 to 15 was used."""

    evaluations: int
    """How often the held-out loss is taken during training, evenly spread; 0 for never."""

    evaluation_rows: int
    """Held-out rows used for it."""

    checkpoints: int
    """How often a checkpoint is written during training, evenly spread; 0 for never."""

    keep_checkpoints: int
    """Older checkpoints than these many are deleted, the best one apart where ``keep`` is ``best``."""

    keep: str
    """Which adapter is the result: that of the ``last`` step, or of the evaluation with the lowest held-out loss, ``best``."""

    patience: int | None
    """Training stops after so many evaluations in a row without a lower held-out loss; None for never."""

    non_finite_steps: int
    """Steps in a row whose loss or gradient is no number, each of them skipped, after which training stops."""

    log_steps: int
    """Steps between two lines of the loss curve."""

    deterministic: bool
    """Insists on kernels that give the same bits twice; slower on some GPUs."""

    objective: str = "sft"
    """``sft``: each trained token's likelihood; ``dpo``: a chosen answer's likelihood over that of a rejected one."""

    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Numbers of the objectives that compare answers; not used by ``sft``."""

    def problems(self) -> Iterator[str]:
        if self.steps is None and self.epochs <= 0:
            yield f"train.epochs must be positive, or train.steps set; got {self.epochs}"
        if self.steps is not None and self.steps < 1:
            yield f"train.steps must be at least 1; got {self.steps}"
        for key in ("micro_batch", "log_steps", "keep_checkpoints", "evaluation_rows", "non_finite_steps"):
            if getattr(self, key) < 1:
                yield f"train.{key} must be at least 1; got {getattr(self, key)}"
        if (self.tokens_per_step is None) == (self.rows_per_step is None):
            yield (
                "train.tokens_per_step and train.rows_per_step both say how much one step reads: set one and leave the other null; "
                f"got {self.tokens_per_step} and {self.rows_per_step}"
            )
        for key in ("tokens_per_step", "rows_per_step"):
            if (value := getattr(self, key)) is not None and value < 1:
                yield f"train.{key} must be at least 1; got {value}"
        for key in ("evaluations", "checkpoints"):
            if getattr(self, key) < 0:
                yield f"train.{key} must be 0 (never) or more; got {getattr(self, key)}"
        for key, allowed in (("checkpointing", CHECKPOINTING), ("keep", KEEP), ("objective", tuple(OBJECTIVES))):
            if (value := getattr(self, key)) not in allowed:
                yield f"train.{key} must be one of {', '.join(allowed)}; got {value!r}"
        if self.patience is not None and self.patience < 1:
            yield f"train.patience must be at least 1, or null for never; got {self.patience}"
        if self.neftune_alpha is not None and self.neftune_alpha <= 0:
            yield f"train.neftune_alpha must be positive, or null for no noise; got {self.neftune_alpha}"
        if not self.evaluations:
            for key, needs in (("patience", self.patience is not None), ("keep", self.keep == "best")):
                if needs:
                    yield f"train.{key}={getattr(self, key)} goes by the held-out loss, which train.evaluations=0 never takes; set 4, say"
        yield from self.preference.problems()

    def conflicts(self, *, rows: str, variant: str, dropout: float) -> Iterator[str]:
        """Problems with what other groups say.

        Args:
            rows: ``data.objective``.
            variant: ``lora.variant``.
            dropout: ``lora.dropout``.
        """
        needed = OBJECTIVES.get(self.objective, rows)
        if rows != needed:
            yield f"train.objective={self.objective} learns from data.objective={needed}; got {rows}: set data.objective={needed}"
        if self.objective != "sft":
            yield from preference_conflicts(variant=variant, dropout=dropout, neftune_alpha=self.neftune_alpha)


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """A plain peft adapter in ``folder/adapter``, and how it came about.

    Attributes:
        folder: Holds adapter/, checkpoints/ and metrics.jsonl.
        steps: Optimizer steps taken.
        seconds: Time in the training loop, evaluations and checkpoints included.
        tokens: Tokens read, padding left out.
        trained_tokens: Tokens that made loss.
        first_loss: Loss of the first logged step, in nats per trained token.
        final_loss: Mean loss of the last tenth of the logged steps.
        optimizer: What was asked for, what was used, why, and the bytes of its states.
        adapter_sha256: Hash of adapter_model.safetensors.
        resumed_from: The step that this training went on from, 0 for a fresh start.
        kept_step: The step whose weights are in the adapter.
        best_heldout_loss: The lowest one seen, in nats per trained token; None where none was taken.
        stopped_early: Whether ``train.patience`` ended it.
        skipped_steps: Steps that were not taken because their loss or gradient was no number; counted in ``steps``.
        micro_batch: Rows that went through the model at once in the end; fewer than asked where memory ran out.
    """

    folder: Path
    steps: int
    seconds: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    trained_tokens_per_second: float
    first_loss: float
    final_loss: float
    optimizer: dict[str, Any]
    trainable_parameters: int
    adapter_sha256: str
    adapter_dtype: str
    resumed_from: int = 0
    kept_step: int = 0
    best_heldout_loss: float | None = None
    stopped_early: bool = False
    skipped_steps: int = 0
    micro_batch: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def adapter(self) -> Path:
        """The peft folder."""
        return self.folder / "adapter"
