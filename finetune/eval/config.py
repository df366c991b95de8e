"""The eval group."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune.eval.harness import HarnessConfig
from finetune.eval.metrics import METRICS

ARTIFACTS = ("base", "base_quantized", "adapter", "merged")
CHANGES = {
    "quantization": ("base", "base_quantized"),
    "tuning": ("base_quantized", "adapter"),
    "merge": ("adapter", "merged"),
    "total": ("base", "merged"),
}
"""What each change compares: the second minus the first."""

LOSSES = ("loss", "perplexity", "general_loss")
ANSWERS = ("stop_rate", "mean_tokens", "repetition")
FIGURES = (*LOSSES, *ANSWERS)
"""Measured for every artifact, whatever the task: general_loss where ``eval.forgetting`` names a text, the last three where
answers are written."""

LOWER_IS_BETTER = ("loss", "perplexity", "general_loss", "mean_tokens", "repetition")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What is measured, on how many held-out rows."""

    rows: int
    """Held-out rows that answers are written for, from the top; 0 measures the loss alone."""

    loss_rows: int
    """Held-out rows that the loss is taken on, from the top."""

    max_new_tokens: int
    """Tokens of an answer at most."""

    batch_rows: int
    """Answers written at a time."""

    batch_tokens: int
    """Padded tokens per forward pass of the loss."""

    metrics: list[str]
    """How answers are compared with the reference, e.g. ``exact_match``; what there is depends on the task."""

    bootstrap_samples: int
    """Resamples behind each interval."""

    forgetting: str | None = None
    """General text that the loss is taken on too, to see what tuning cost elsewhere: text with blank lines between documents,
    or a ``.jsonl`` file with ``text`` or ``messages`` in each row. None measures the task alone."""

    harness: HarnessConfig = field(default_factory=HarnessConfig)
    """Tasks of lm-eval beside the held-out rows."""

    gate: dict[str, float] = field(default_factory=dict)
    """Thresholds, ``<artifact or change>.<figure>: number``: at least it, or at most it for loss, perplexity,
    general_loss, mean_tokens and repetition. One that is missed ends the run with exit code 1, after the report."""

    def problems(self) -> Iterator[str]:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            yield f"eval.metrics: {', '.join(unknown)} unknown; there are {', '.join(sorted(METRICS))}"
        if self.rows < 0:
            yield f"eval.rows must not be negative; got {self.rows}"
        if self.rows and not self.metrics:
            yield f"eval.metrics is empty, so the answers of eval.rows={self.rows} would not be judged; name one, or set eval.rows=0"
        numbers = {"loss_rows": self.loss_rows, "max_new_tokens": self.max_new_tokens, "batch_rows": self.batch_rows}
        for key, value in {
            **numbers,
            "batch_tokens": self.batch_tokens,
            "bootstrap_samples": self.bootstrap_samples,
        }.items():
            if value < 1:
                yield f"eval.{key} must be at least 1; got {value}"
        if self.forgetting is not None and not Path(self.forgetting).is_file():
            yield f"eval.forgetting: {self.forgetting} does not exist; give a file of general text, or null"
        yield from self.harness.problems()
        for key in self.gate:
            yield from self._gate_problems(key)

    def _gate_problems(self, key: str) -> Iterator[str]:
        subject, _, figure = key.partition(".")
        if subject not in (*ARTIFACTS, *CHANGES):
            yield f"eval.gate: {key!r} must begin with one of {', '.join((*ARTIFACTS, *CHANGES))}, e.g. adapter.loss"
        if figure == "general_loss" and self.forgetting is None:
            yield f"eval.gate: {key!r} needs general text, and eval.forgetting=null names none; give a file"
        if not self.rows and figure in (*ANSWERS, *self.metrics):
            yield f"eval.gate: {key!r} needs answers, and eval.rows=0 writes none; set eval.rows"
        elif figure not in (*FIGURES, *self.metrics):
            yield f"eval.gate: {key!r} must end with one of {', '.join((*FIGURES, *self.metrics))}, e.g. adapter.loss"
