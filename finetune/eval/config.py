"""Settings of the eval group."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.eval.harness import HarnessConfig
from finetune.eval.metrics import METRICS

ARTIFACTS = ("base", "base_quantized", "adapter", "merged")
AUTO = "auto"
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
"""Measured for every artifact and task: general_loss if ``eval.general_text`` names a text, the last three if answers
are written."""

LOWER_IS_BETTER = ("loss", "perplexity", "general_loss", "mean_tokens", "repetition")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Selects the metrics, and the number of held-out rows to measure them on."""

    rows: int
    """Held-out rows to generate answers for, from the top; 0 measures the loss alone."""

    loss_rows: int
    """Held-out rows to compute the loss on, from the top."""

    max_new_tokens: int
    """Maximum tokens of an answer."""

    batch_tokens: int
    """Padded tokens per forward pass of the loss."""

    metrics: list[str]
    """Metrics of the answers, e.g. ``exact_match``; choose those that fit the task."""

    bootstrap_samples: int
    """Resamples behind each interval."""

    batch_rows: Any = AUTO  # a whole number or auto; OmegaConf 2.3 cannot merge unions into a missing group
    """Batch size of generation. ``auto`` computes it for each batch from the lengths of its prompts and the free
    memory. Answers do not depend on it, except where two tokens are nearly tied: logits differ by rounding between
    batch sizes (1e-5 in float32)."""

    artifacts: Any = AUTO  # a list or auto
    """The artifacts to measure: a list, with ``adapter`` and ``merged``, which exports are compared with. ``auto``
    measures all four, but leaves the dense base out where it does not fit in memory and reading its offloaded weights
    would take more than ten minutes: it is the only one that no later stage needs. It is measured where a threshold of
    ``eval.gate`` needs it."""

    general_text: str | None = None
    """General text to compute the loss on too, which shows what tuning made the model forget: text with blank lines
    between documents, or a ``.jsonl`` file with ``text`` or ``messages`` in each row. None measures the task alone."""

    harness: HarnessConfig = field(default_factory=HarnessConfig)
    """Tasks of lm-eval, in addition to the held-out rows."""

    gate: dict[str, float] = field(default_factory=dict)
    """Thresholds, ``<artifact or change>.<figure>: number``: a minimum, or a maximum for loss, perplexity,
    general_loss, mean_tokens and repetition. A missed one ends the run with exit code 1, after the report."""

    @property
    def fixed_rows(self) -> int | None:
        """The batch size of generation; None where it is computed."""
        return None if self.batch_rows == AUTO else int(self.batch_rows)

    @property
    def measured(self) -> tuple[str, ...]:
        """The artifacts to measure, in the order of `ARTIFACTS`."""
        return ARTIFACTS if self.artifacts == AUTO else tuple(name for name in ARTIFACTS if name in self.artifacts)

    @property
    def may_leave_out_base(self) -> bool:
        """Whether the dense base may be left out: ``artifacts=auto``, and no threshold needs it."""
        subjects = {key.partition(".")[0] for key in self.gate}
        return self.artifacts == AUTO and not subjects & {"base", "quantization", "total"}

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        if self.rows == 0:
            yield from ((name, "no answers are written") for name in ("max_new_tokens", "batch_rows"))

    def problems(self) -> Iterator[str]:
        """Yields one sentence for each setting that is not allowed."""
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            yield f"eval.metrics: {', '.join(unknown)} unknown; there are {', '.join(sorted(METRICS))}"
        if self.rows < 0:
            yield f"eval.rows must not be negative; got {self.rows}"
        if self.rows and not self.metrics:
            yield (
                f"eval.metrics is empty, so the answers of eval.rows={self.rows} would not be scored; "
                "name one, or set eval.rows=0"
            )
        for key in ("loss_rows", "max_new_tokens", "batch_tokens", "bootstrap_samples"):
            if (value := getattr(self, key)) < 1:
                yield f"eval.{key} must be at least 1; got {value}"
        if self.batch_rows != AUTO and (type(self.batch_rows) is not int or self.batch_rows < 1):
            yield f"eval.batch_rows must be auto or a whole number of at least 1; got {self.batch_rows!r}"
        yield from self._artifact_problems()
        if self.general_text is not None and not Path(self.general_text).is_file():
            yield f"eval.general_text: {self.general_text} does not exist; give a file of general text, or null"
        yield from self.harness.problems()
        for key in self.gate:
            yield from self._gate_problems(key)

    def _artifact_problems(self) -> Iterator[str]:
        if self.artifacts == AUTO:
            return
        names = self.artifacts if isinstance(self.artifacts, list | tuple) else []
        if not {"adapter", "merged"} <= set(map(str, names)) <= set(ARTIFACTS):
            yield (
                f"eval.artifacts must be auto, or a list of {', '.join(ARTIFACTS)} with adapter and merged, which "
                f"exports are compared with; got {self.artifacts!r}"
            )
            return
        for key in self.gate:
            subject = key.partition(".")[0]
            missing = set(CHANGES.get(subject, (subject,))) & set(ARTIFACTS) - set(self.artifacts)
            if missing:
                yield f"eval.gate: {key!r} needs {' and '.join(sorted(missing))}, which eval.artifacts leaves out"

    def _gate_problems(self, key: str) -> Iterator[str]:
        subject, _, figure = key.partition(".")
        if subject not in (*ARTIFACTS, *CHANGES):
            yield f"eval.gate: {key!r} must begin with one of {', '.join((*ARTIFACTS, *CHANGES))}, e.g. adapter.loss"
        if figure == "general_loss" and self.general_text is None:
            yield f"eval.gate: {key!r} needs general text, and eval.general_text=null names none; give a file"
        if not self.rows and figure in (*ANSWERS, *self.metrics):
            yield f"eval.gate: {key!r} needs answers, and eval.rows=0 writes none; set eval.rows"
        elif figure not in (*FIGURES, *self.metrics):
            yield f"eval.gate: {key!r} must end with one of {', '.join((*FIGURES, *self.metrics))}, e.g. adapter.loss"
