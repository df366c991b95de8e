"""Estimates how long training, evaluation and merge will take; the plan says that the estimate is rough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.inference.budget import MOST_ROWS
from finetune.plan import weights
from finetune.plan.inputs import PlanInputs
from finetune.plan.throughput import Throughput, passes, token_operations

if TYPE_CHECKING:
    from finetune.config import RunConfig

TOKEN_BYTES = 4
"""Approximate bytes of text per token: GPT-2's tokenizer makes one of 4 characters of English. Source: OpenAI's
tokenizer page."""

DISK_BANDWIDTH = 500e6
"""Bytes per second of a solid-state disk on SATA."""

ARTIFACTS = 4
"""Models that the eval stage measures: base, quantized base, adapter, merged."""


def stage_seconds(config: RunConfig, inputs: PlanInputs, speed: Throughput) -> dict[str, float]:
    """Estimates the long stages; ``train`` is missing where the amount of data is not known before it is prepared."""
    tokens = training_tokens(config, inputs)
    train = {} if tokens is None else {"train": tokens / speed.tokens_per_second + _held_out(config, inputs, speed)}
    return {**train, "merge": merge_seconds(config, inputs, speed), "eval": eval_seconds(config, inputs, speed)}


def training_tokens(config: RunConfig, inputs: PlanInputs) -> float | None:
    """Returns the tokens that training reads; None where neither the steps nor the data's size are known."""
    if config.train.steps is not None:
        rows = config.train.rows_per_step
        step_tokens = config.train.tokens_per_step or inputs.tokens
        if rows is not None:
            step_tokens = rows * inputs.documents * inputs.tokens
        return float(config.train.steps * step_tokens)
    file = Path(config.data.path).expanduser() if config.data.path else None
    if file is None or not file.is_file():
        return None
    return config.train.epochs * file.stat().st_size / TOKEN_BYTES


def forward_seconds(inputs: PlanInputs, speed: Throughput, *, tokens: float) -> float:
    """Returns seconds of forward passes without gradients; a training step takes as long as two or more of them."""
    return tokens * token_operations(inputs) / passes(inputs) / speed.operations_per_second


def _held_out(config: RunConfig, inputs: PlanInputs, speed: Throughput) -> float:
    rows = config.train.evaluations * config.train.evaluation_rows * inputs.documents
    return forward_seconds(inputs, speed, tokens=rows * min(inputs.tokens, config.data.max_tokens))


def eval_seconds(config: RunConfig, inputs: PlanInputs, speed: Throughput) -> float:
    """Estimates the eval stage: each of four models is loaded, computes losses, and generates answers in batches."""
    dense = weights.dense_bytes(inputs)
    losses = forward_seconds(inputs, speed, tokens=config.eval.loss_rows * config.data.max_tokens)
    rows = config.eval.fixed_rows or min(MOST_ROWS, max(1, config.eval.rows))
    batches = -(-config.eval.rows // rows)
    token = max(dense / speed.bandwidth, forward_seconds(inputs, speed, tokens=rows))
    return ARTIFACTS * (dense / DISK_BANDWIDTH + losses + batches * config.eval.max_new_tokens * token)


def merge_seconds(config: RunConfig, inputs: PlanInputs, speed: Throughput) -> float:
    """Estimates the merge stage: candidates are written and measured, as are the trained model and the result."""
    candidates = len(config.merge.candidates)
    measured = forward_seconds(inputs, speed, tokens=(candidates + 2) * config.merge.loss_rows * config.data.max_tokens)
    return 2 * candidates * weights.dense_bytes(inputs) / DISK_BANDWIDTH + measured
