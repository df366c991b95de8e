"""What each stage leaves for the stages after it: frozen, and all but the folder kept in the stage's manifest.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Token ids with masks, on disk.

    Attributes:
        folder: ``train/`` and ``heldout/`` open with ``datasets.load_from_disk``; ``ledger.parquet`` has one line per
            input row; ``rendering.json`` says how conversations were written; ``preview.html`` shows some.
        rows: ``in`` = ``kept`` + the sum of ``dropped`` (by reason) + ``duplicate``; ``truncated`` are among the kept.
        tokens: Tokens in training documents.
        trained_tokens: Those of them that carry loss.
        packed_rows: Rows of ``train/``.
        train_rows: Input rows that are trained on.
        heldout_rows: Input rows kept for evaluation.
        longest: Tokens of the longest row of ``train/``.
        fingerprint: Hash of the data, template, tokenizer, settings and code.
        warnings: One sentence each.
        lengths: Quantiles, histogram, and what each threshold would cut.
        sources: What was read, by name: files without their folders, data sets on the hub with their revision.
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
class PreflightResult:
    """The checks before training, in the order in which they ran.

    Attributes:
        folder: Holds trained_text.txt, the text that the first batch trains on.
        checks: ``{"name", "passed", "figure", "bound", "sentence", "cause", "seconds"}`` each.
        packing_is_isolated: Whether documents packed in one row do not read each other; true where it was not checked.
        fused_layers_are_exact: Whether fused layers give the gradient of the original ones; true where not checked.
        skipped: ``{"name", "sentence", "why"}`` of each check that did not run.
        seconds: Duration of the checks.
        training_seconds: Estimated duration of the training; None where no gradient was timed.
        day: When the checks ran: before this run, where an earlier one had the same inputs.
    """

    folder: Path
    checks: list[dict[str, Any]]
    packing_is_isolated: bool
    fused_layers_are_exact: bool
    skipped: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    training_seconds: float | None = None
    day: str = ""


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


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """One plain model, made of base and adapter.

    Attributes:
        folder: The stage's folder; the model is in ``folder/model``, with its tokenizer.
        chosen: Name of the candidate that was kept.
        rule: Why that one.
        loss_rows: Held-out rows that the losses below were taken on.
        reference: The trained graph itself: ``{"loss", "loss_low", "loss_high", "perplexity", "tokens"}``.
        candidates: The same of each, and ``{"name", "loss_difference": {"difference", "low", "high"}, "kl", "top1_agreement",
            "max_difference", "compared_tokens", "bytes", "adapted_weights", "changed_weights"}``; the difference is to the
            trained graph, paired by row, and ``changed_weights`` differ from the base after rounding.
        reloaded: The chosen one's losses and distances again, measured by a fresh process from the files that were kept.
        sha256: Over the weight files of ``folder/model``.
        adapters: Weights of further adapters that are in it too, by folder.
    """

    folder: Path
    chosen: str
    rule: str
    loss_rows: int
    reference: dict[str, Any]
    candidates: list[dict[str, Any]]
    reloaded: dict[str, Any]
    sha256: str
    adapters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How good each artifact is.

    Attributes:
        folder: Holds ``samples.jsonl``: each row's prompt, reference and all answers with their scores.
        artifacts: ``base``, ``base_quantized``, ``adapter``, ``merged``: ``{"loss", "loss_low", "loss_high",
            "perplexity", "tokens", "token_accuracy", "metrics": {name: {"value", "low", "high"}}, "stop_rate",
            "mean_tokens", "repetition", "general_loss": {"value", "low", "high"}}``; the three before the last only where answers
            were written, the last, in nats per token, only where ``eval.general_text`` names general text.
        changes: ``quantization``, ``tuning``, ``merge``, ``total``: ``{figure: {"difference", "low", "high"}}``,
            paired by row, 95 %.
        rows: Rows that answers were written for.
        loss_rows: Rows that the loss was taken on.
        missed: One sentence for each threshold of ``eval.gate`` that was not met.
    """

    folder: Path
    artifacts: dict[str, dict[str, Any]]
    changes: dict[str, dict[str, dict[str, float]]]
    rows: int
    loss_rows: int
    missed: list[str]


@dataclass(frozen=True, kw_only=True)
class Exports:
    """What left the house.

    Attributes:
        folder: The stage's folder; each export lies in it under its name.
        exports: ``{"format", "path", "bytes", "sha256", "parity"}`` each; ``path`` is seen from the run folder, and
            ``parity`` holds what its own runtime gave beside the bounds (empty for what no runtime opens).
    """

    folder: Path
    exports: list[dict[str, Any]]
