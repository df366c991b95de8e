"""The figures that stages measure and pass on inside their products: losses, answers, differences, comparisons."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.console import change_text
from finetune.jsonable import OMIT_NONE


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        """Writes ``0.863 [0.821, 0.902]``."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class LossScores:
    """A model's loss on the held-out rows, in nats per trained token, with its 95 % interval."""

    loss: float
    loss_low: float
    loss_high: float
    perplexity: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference with its 95 % interval."""

    difference: float
    low: float
    high: float

    def text(self, *, digits: int = 4) -> str:
        """Writes ``+0.0012 [-0.0003, +0.0027]``."""
        return change_text(vars(self), digits=digits)


@dataclass(frozen=True, kw_only=True)
class ComparedScores(LossScores):
    """A model's loss, and its distance from the trained model.

    Attributes:
        loss_difference: From the trained model's loss, paired by row.
        kl: Mean KL(trained model || this one), in nats per token.
        top1_agreement: Share of positions where both rank the same token first.
        max_difference: Largest difference of a log-probability.
        compared_tokens: Positions that the distances were measured on.
    """

    loss_difference: Difference
    kl: float
    top1_agreement: float
    max_difference: float
    compared_tokens: int


@dataclass(frozen=True, kw_only=True)
class CandidateScores:
    """One way to merge, with the figures of `ComparedScores`.

    Attributes:
        name: ``dequantized`` or ``original``.
        bytes: Size of its weights.
        adapted_weights: Number of weights in tensors that the adapter changes.
        changed_weights: Number of those that differ from the base after rounding.
    """

    name: str
    loss: float
    loss_low: float
    loss_high: float
    perplexity: float
    tokens: int
    loss_difference: Difference
    kl: float
    top1_agreement: float
    max_difference: float
    compared_tokens: int
    bytes: int
    adapted_weights: int
    changed_weights: int


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """A metric of an lm-eval task; ``stderr`` is None where lm-eval has none."""

    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The results of one lm-eval task or group.

    Attributes:
        rows: Number of rows; None for a group.
        shots: Few-shot examples.
        version: Of the task.
        metrics: By name.
    """

    rows: int | None
    shots: int | None
    version: float | str | None
    metrics: dict[str, TaskMetric]


@dataclass(frozen=True, kw_only=True)
class HarnessScores:
    """The results of lm-eval's tasks and groups, by name, with lm-eval's version."""

    lm_eval: str
    tasks: dict[str, TaskScores]


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """The scores of generated answers; all but ``metrics`` are None without answers.

    Attributes:
        metrics: By name, those of ``eval.metrics``.
        stop_rate: Share of the answers that ended within the limit.
        mean_tokens: Of an answer.
        repetition: Share of repeated token sequences.
    """

    metrics: dict[str, Interval]
    stop_rate: float | None = field(default=None, metadata=OMIT_NONE)
    mean_tokens: float | None = field(default=None, metadata=OMIT_NONE)
    repetition: float | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class ArtifactScores(LossScores):
    """The evaluation of one artifact: its loss, and the figures of `AnswerScores`.

    Attributes:
        token_accuracy: Share of the trained tokens that are the most likely ones.
        general_loss: In nats per token; None unless ``eval.general_text`` names a text.
        harness: None unless ``eval.harness.tasks`` names a task.
    """

    token_accuracy: float
    metrics: dict[str, Interval]
    stop_rate: float | None = field(default=None, metadata=OMIT_NONE)
    mean_tokens: float | None = field(default=None, metadata=OMIT_NONE)
    repetition: float | None = field(default=None, metadata=OMIT_NONE)
    general_loss: Interval | None = field(default=None, metadata=OMIT_NONE)
    harness: HarnessScores | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class ModelAnswers:
    """The artifact that an export's answers are compared with, and the figures of `AnswerScores` on the same rows."""

    name: str
    metrics: dict[str, Interval]
    stop_rate: float
    mean_tokens: float
    repetition: float


@dataclass(frozen=True, kw_only=True)
class ExportAnswers:
    """The scores of an export's answers, and those of its model on the same rows.

    Attributes:
        rows: Number of answers.
        metrics, stop_rate, mean_tokens, repetition: As in `AnswerScores`.
        model: The artifact that the export was made from.
        changes: Each figure's difference from that artifact, paired by row.
        seconds: Time that the answers took.
    """

    rows: int
    metrics: dict[str, Interval]
    stop_rate: float
    mean_tokens: float
    repetition: float
    model: ModelAnswers
    changes: dict[str, Difference]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RoundingCost:
    """What an export's fewer bits cost, compared with the merged model; losses are None without held-out rows."""

    kl: float
    top1_agreement: float
    rows: int
    loss: float | None = field(default=None, metadata=OMIT_NONE)
    model_loss: float | None = field(default=None, metadata=OMIT_NONE)
    loss_difference: Difference | None = field(default=None, metadata=OMIT_NONE)
    note: str


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The comparison of an export, in its own runtime, with the model that it was made from.

    Attributes:
        passed: Whether all bounds hold; an export that misses one is discarded.
        runtime: Packages with their versions.
        chats: Reference chats that gave the same token ids.
        prompts: Prompts whose logits were compared.
        max_logit_difference: The largest.
        bound: What it may be.
        kl: Mean KL(model || export), in nats per position.
        top1_agreement: Share of positions where both rank the same token first.
        stops: Whether the greedy answer to the last prompt ended.
        rows: Held-out rows of the losses; 0 for none, and the figures from ``loss`` on are None then.
        loss, loss_low, loss_high, perplexity, tokens: Of the export, as in `LossScores`.
        model_loss: The model's own.
        loss_difference: From the model's loss, paired by row.
        answers: The export's answers to held-out prompts; None without.
        cost: Of fewer bits; None where the export has the model's dtype.
    """

    passed: bool
    runtime: str
    chats: int
    prompts: int
    max_logit_difference: float
    bound: float
    kl: float
    top1_agreement: float
    stops: bool
    rows: int
    loss: float | None = field(default=None, metadata=OMIT_NONE)
    loss_low: float | None = field(default=None, metadata=OMIT_NONE)
    loss_high: float | None = field(default=None, metadata=OMIT_NONE)
    perplexity: float | None = field(default=None, metadata=OMIT_NONE)
    tokens: int | None = field(default=None, metadata=OMIT_NONE)
    model_loss: float | None = field(default=None, metadata=OMIT_NONE)
    loss_difference: Difference | None = field(default=None, metadata=OMIT_NONE)
    answers: ExportAnswers | None = field(default=None, metadata=OMIT_NONE)
    cost: RoundingCost | None = field(default=None, metadata=OMIT_NONE)
