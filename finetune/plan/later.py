"""How the stages after training will run on a device: with the functions that decide it in the run."""

from __future__ import annotations

from finetune.errors import HardwareError
from finetune.inference.budget import (
    FLOAT,
    LONGEST_READ_SECONDS,
    FreeMemory,
    InferenceCost,
    WeightPlacement,
    Workload,
    place_weights,
)
from finetune.parameters import parameters
from finetune.plan.inputs import PlanInputs

AFTER_TRAINING = ("eval", "merge")
"""Stages that measure dense models. They adapt to the memory that there is, so they do not decide whether training
fits."""

SAMPLER_COPIES = 4
"""Tensors of the logits' size in `finetune.inference.sampling.SeededChoice`."""

UNKNOWN_BYTES = 2**50
"""Stands for the memory of a device that is not known."""


def place(inputs: PlanInputs, stage: str, *, free: int, host: int) -> WeightPlacement | None:
    """Decides where a dense model's weights lie in a stage after training, as the stage will.

    Args:
        inputs: The training configuration.
        stage: One of `AFTER_TRAINING`.
        free: Bytes of one device that a process may allocate; 0 where they are not known.
        host: Memory of the host.

    Returns:
        The placement; None where not even one row fits.
    """
    devices = (free or UNKNOWN_BYTES,) * (inputs.processes if inputs.device == "cuda" else 1)
    try:
        return place_weights(
            dense_bytes(inputs),
            cost=cost_of(inputs),
            workload=workload(inputs, stage, smallest=not free),
            free=FreeMemory(devices=devices, host=host if inputs.device == "cuda" else None),
        )
    except HardwareError:
        return None


def terms(inputs: PlanInputs, stage: str, placed: WeightPlacement | None) -> dict[str, float]:
    """Returns the bytes on one device by term; without a placement those of all weights and one row."""
    asked = workload(inputs, stage, smallest=True)
    placed = placed or place(inputs, stage, free=0, host=0)
    assert placed is not None, "one row fits in memory without bound"
    cache = placed.answer_rows * (asked.prompt_tokens + asked.new_tokens) * cost_of(inputs).cache_token_bytes
    limit = placed.max_memory.get("cpu" if inputs.device == "cpu" else 0, dense_bytes(inputs))
    return {
        "weights": float(min(dense_bytes(inputs), limit)),
        "cache": float(cache),
        "activations": float(placed.working_bytes - cache),
    }


def sampling_terms(inputs: PlanInputs) -> dict[str, float]:
    """Returns what sampling one batch of answers adds in training: keys and values, and one token of all rows.

    The sampler has a row's logits four times in float32: scaled, their noise, the sum, and the one that is left.
    """
    cost, rows = cost_of(inputs), inputs.sampled_rows
    prompt = max(1, inputs.tokens - inputs.sampled_tokens)
    logits = rows * (cost.row_bytes + SAMPLER_COPIES * FLOAT * inputs.architecture.vocab_size)
    return {
        "cache": float(rows * inputs.tokens * cost.cache_token_bytes),
        "activations": float(rows * cost.pass_bytes(prompt) + logits),
    }


def text(inputs: PlanInputs, stage: str, placed: WeightPlacement | None) -> str:
    """Describes how a stage will run where its dense model does not fit; empty where it fits."""
    if placed is None:
        return "does not fit: not even one row, without weights"
    if not placed.max_memory:
        return ""
    if not placed.offloaded_bytes:
        return f"spreads the dense model over {inputs.processes} GPUs"
    share, source = placed.offloaded_bytes / dense_bytes(inputs), "disk" if placed.disk_bytes else "host memory"
    left_out = stage == "eval" and placed.read_seconds > LONGEST_READ_SECONDS and not inputs.needs_base
    base = "; the dense base is left out (eval.artifacts=auto)" if left_out else ""
    return f"reads {share:.0%} of the dense model from {source} for each pass{base}"


def cost_of(inputs: PlanInputs) -> InferenceCost:
    """Returns what inference needs besides the weights."""
    return InferenceCost.of(inputs.architecture, element_bytes=inputs.compute_bytes)


def dense_bytes(inputs: PlanInputs) -> int:
    """Returns the bytes of the dense model in the dtype that it is computed in."""
    return parameters(inputs.architecture) * inputs.compute_bytes


def workload(inputs: PlanInputs, stage: str, *, smallest: bool) -> Workload:
    """Returns what the stage asks of a dense model; held-out rows are taken to be as long as allowed.

    Args:
        inputs: The training configuration.
        stage: One of `AFTER_TRAINING`.
        smallest: Answers one row at a time, where the batch size is left to the free memory.
    """
    longest = inputs.prompt_tokens or inputs.tokens
    pass_tokens = max(inputs.measured_tokens, longest)
    losses = Workload(pass_tokens=pass_tokens, passes=-(-inputs.measured_rows * longest // pass_tokens))
    if stage != "eval" or not inputs.answers:
        return losses
    return Workload(
        pass_tokens=losses.pass_tokens,
        passes=losses.passes,
        rows=inputs.answers,
        prompt_tokens=min(longest, inputs.architecture.max_positions - inputs.answer_tokens),
        new_tokens=inputs.answer_tokens,
        batch_rows=inputs.answer_rows or (1 if smallest else None),
    )
