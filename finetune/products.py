"""The results that each stage passes to later stages: frozen, and saved without the folder in its manifest.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.jsonable import EMPTY_NONE, OMIT_NONE
from finetune.scores import ArtifactScores, CandidateScores, ComparedScores, Difference, LossScores, Parity

UNDESIRABLE_HELDOUT = "heldout_undesirable"
"""Folder of the data stage with the held-out answers that are not references; only with data.objective=unpaired."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Token ids with masks, on disk.

    Attributes:
        folder: ``train/`` and ``heldout/`` open with ``datasets.load_from_disk``; ``ledger.parquet`` has one row per
            input row; ``rendering.json`` describes the chat template; ``preview.html`` shows examples.
        rows: ``in`` = ``kept`` + the sum of ``dropped`` (by reason) + ``duplicate``; ``truncated`` are among the kept.
        tokens: Tokens in training documents.
        trained_tokens: Tokens of those with a loss.
        packed_rows: Rows of ``train/``.
        train_rows: Input rows in the training split.
        heldout_rows: Input rows in the held-out split.
        longest: Tokens of the longest row of ``train/``.
        fingerprint: Hash of the data, template, tokenizer, settings and code.
        warnings: One sentence each.
        lengths: Quantiles, histogram, and what each threshold would cut.
        sources: Names of the inputs: files without their folders, datasets on the hub with their revision.
    """

    folder: Path
    rows: dict[str, Any]
    tokens: int
    trained_tokens: int
    packed_rows: int
    train_rows: int
    heldout_rows: int
    longest: int
    fingerprint: str
    warnings: list[str]
    lengths: dict[str, Any]
    sources: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CheckRecord:
    """A check that ran.

    Attributes:
        name: Of the check, e.g. ``packing``.
        passed: Whether the figure is within the bound.
        figure: What was measured.
        bound: What is allowed.
        sentence: The statement that was checked.
        cause: The likely cause of a failure.
        seconds: Duration.
    """

    name: str
    passed: bool
    figure: str
    bound: str
    sentence: str
    cause: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SkippedCheck:
    """A check that did not run, and why."""

    name: str
    sentence: str
    why: str


@dataclass(frozen=True, kw_only=True)
class PreflightResult:
    """The checks, in the order in which they ran.

    Attributes:
        folder: Holds trained_text.txt, the text of the first batch that has a loss.
        checks: Those that ran.
        packing_is_isolated: Whether documents packed into one row cannot attend to each other; true where it was
            not checked.
        fused_layers_are_exact: Whether fused kernels give the gradient of the plain layers; true where it was not
            checked.
        skipped: Those that did not.
        seconds: Duration of the checks.
        training_seconds: Estimated duration of training; None where no gradient was timed.
        day: When the checks ran; before this run where an earlier result for the same inputs is used.
    """

    folder: Path
    checks: list[CheckRecord]
    packing_is_isolated: bool
    fused_layers_are_exact: bool
    skipped: list[SkippedCheck] = field(default_factory=list)
    seconds: float = 0.0
    training_seconds: float | None = None
    day: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """A plain peft adapter in ``folder/adapter``, with the figures of its training.

    Attributes:
        folder: Holds adapter/, checkpoints/ and metrics.jsonl.
        steps: Optimizer steps taken.
        seconds: Time in the training loop, evaluations and checkpoints included.
        tokens: Tokens processed, without padding.
        trained_tokens: Tokens with a loss.
        first_loss: Loss of the first logged step, in nats per trained token.
        final_loss: Mean loss of the last tenth of the logged steps.
        optimizer: The one requested, the one used, the reason, and the bytes of its states.
        adapter_sha256: Hash of adapter_model.safetensors.
        resumed_from: The step that training resumed from; 0 for a new training.
        kept_step: The step whose weights are in the adapter.
        best_heldout_loss: The lowest, in nats per trained token; None where it was not measured.
        stopped_early: Whether ``train.patience`` stopped it.
        skipped_steps: Steps without an update because loss or gradient were not finite; counted in ``steps``.
        micro_batch: Micro-batch size at the end, in rows; smaller than configured after running out of memory.
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


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """One dense model, made of base and adapter.

    Attributes:
        folder: The stage's folder; the model is in ``folder/model``, with its tokenizer.
        chosen: Name of the selected candidate.
        rule: Why it was selected.
        loss_rows: Number of held-out rows that the losses below were measured on.
        reference: The trained model: quantized base and adapter.
        candidates: Every merge that was built.
        reloaded: The selected candidate again, measured by a fresh process from the files.
        sha256: Over the weight files of ``folder/model``.
        adapters: Weights of the further adapters that are merged too, by folder.
        compute_dtype: That the candidates were measured in; the weights are stored in ``merge.dtype``.
        halvings: How often batches were halved after running out of memory.
    """

    folder: Path
    chosen: str
    rule: str
    loss_rows: int
    reference: LossScores
    candidates: list[CandidateScores]
    reloaded: ComparedScores
    sha256: str
    adapters: dict[str, float] = field(default_factory=dict)
    compute_dtype: str = ""
    halvings: int = 0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The evaluation of each artifact.

    Attributes:
        folder: Holds ``samples.jsonl``: each row's prompt, reference and all answers with their scores.
        artifacts: The figures of ``base``, ``base_quantized``, ``adapter``, ``merged``.
        changes: By ``quantization``, ``tuning``, ``merge``, ``total``: the difference of each figure, paired by row.
        rows: Number of rows with generated answers.
        loss_rows: Number of rows that the loss was measured on.
        missed: One sentence for each threshold of ``eval.gate`` that is not met.
        left_out: By artifact that was not measured, the reason.
        compute_dtypes: By artifact, the dtype that it was computed in.
        halvings: How often batches were halved after running out of memory.
    """

    folder: Path
    artifacts: dict[str, ArtifactScores]
    changes: dict[str, dict[str, Difference]]
    rows: int
    loss_rows: int
    missed: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    compute_dtypes: dict[str, str] = field(default_factory=dict)
    halvings: int = 0


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """One exported file or folder.

    Attributes:
        format: As in ``export.<name>.format``.
        path: Relative to the run folder.
        bytes: Size of all its files.
        sha256: Over its weight files.
        parity: The comparison with its model in its own runtime; None where the format has no runtime.
        notes: What a user of the file should know, one sentence each; None where the format has none.
    """

    format: str
    path: str
    bytes: int
    sha256: str
    parity: Parity | None = field(default=None, metadata=EMPTY_NONE)
    notes: list[str] | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class Exports:
    """The exported files.

    Attributes:
        folder: The stage's folder; each export is in it under its name.
        exports: In the order of writing.
        halvings: How often batches were halved after running out of memory.
    """

    folder: Path
    exports: list[ExportResult]
    halvings: int = 0
