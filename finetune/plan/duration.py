"""How long the stages take: as earlier runs of the same model here took, at best by a table, or not known."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.plan.inputs import PlanInputs
from finetune.plan.throughput import earlier_runs, is_listed, passes, table_throughput, token_operations
from finetune.quantization.config import QAT

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.hardware import Machine

TOKEN_BYTES = 4
"""Approximate bytes of text per token: GPT-2's tokenizer makes one of 4 characters of English. Source: OpenAI's
tokenizer page."""

UNKNOWN = "unknown until the first step"
UNKNOWN_SAMPLING = "unknown until the first step: answers are sampled, whose length decides the time"
UNKNOWN_ROUNDING = "unknown until the first step: quantization=qat rounds every weight in each step"


@dataclass(frozen=True, kw_only=True)
class Duration:
    """How long a run takes.

    Attributes:
        tokens_per_second: Of training, over all devices; 0 where it is not known.
        seconds: Of the stages train, merge and eval, as far as they are known.
        source: Where the figures come from, or that they are not known.
        is_measured: Whether they come from earlier runs; otherwise a run is slower, by much for a small model.
    """

    tokens_per_second: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    source: str = UNKNOWN
    is_measured: bool = False


def duration(config: RunConfig, inputs: PlanInputs, machine: Machine, *, runs: Path | None) -> Duration:
    """Estimates the time of training; that of merge and eval only from earlier runs.

    Args:
        config: The whole configuration.
        inputs: The same, as the plan reads it.
        machine: This machine, or a named one.
        runs: Folder of earlier runs on this machine; None where the machine is only named.
    """
    if inputs.sampled_rows:
        return Duration(source=UNKNOWN_SAMPLING)
    if inputs.method == QAT:
        return Duration(source=UNKNOWN_ROUNDING)
    earlier = earlier_runs(inputs, machine, runs) if runs else []
    if earlier:
        operations = statistics.median(run.operations_per_second for run in earlier)
        speed = operations * inputs.processes / token_operations(inputs)
        took = {stage: [run.seconds[stage] for run in earlier if stage in run.seconds] for stage in ("merge", "eval")}
        later = {stage: statistics.median(seconds) for stage, seconds in took.items() if seconds}
        source = f"{len(earlier)} earlier run{'s' if len(earlier) > 1 else ''} of this model here"
        return Duration(
            tokens_per_second=speed,
            seconds={**_train_seconds(config, inputs, speed), **later},
            source=source,
            is_measured=True,
        )
    if is_listed(inputs, machine):
        speed = table_throughput(inputs, machine)
        source = "the maker's figures"
        return Duration(tokens_per_second=speed, seconds=_train_seconds(config, inputs, speed), source=source)
    return Duration()


def training_tokens(config: RunConfig, inputs: PlanInputs) -> float | None:
    """Returns the tokens that training reads; None where neither the steps nor the data's size are known."""
    if config.train.steps is not None:
        return float(config.train.steps * _step_tokens(config, inputs))
    file = Path(config.data.path).expanduser() if config.data.path else None
    if file is None or not file.is_file():
        return None
    return config.train.epochs * file.stat().st_size / TOKEN_BYTES


def _step_tokens(config: RunConfig, inputs: PlanInputs) -> int:
    """Returns the tokens that one optimizer step reads."""
    if config.train.rows_per_step is not None:
        return config.train.rows_per_step * inputs.documents * inputs.tokens
    return config.train.tokens_per_step or inputs.tokens


def _evaluations(config: RunConfig, inputs: PlanInputs, *, tokens: float) -> float:
    """Returns how often held-out rows are evaluated while training reads its tokens."""
    if config.train.eval_steps is None:
        return config.train.evaluations
    return tokens / _step_tokens(config, inputs) // config.train.eval_steps


def _train_seconds(config: RunConfig, inputs: PlanInputs, speed: float) -> dict[str, float]:
    """Returns the seconds of training with its evaluations, whose passes make no gradient; empty where not known."""
    tokens = training_tokens(config, inputs)
    if tokens is None:
        return {}
    times = _evaluations(config, inputs, tokens=tokens)
    rows = times * config.train.evaluation_rows * inputs.documents * (1 + inputs.extra_passes)
    held_out = rows * min(inputs.tokens, config.data.max_tokens) / passes(inputs)
    return {"train": (tokens + held_out) / speed}
