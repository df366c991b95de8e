"""Proposes settings: of all that fit the machine, those that should read most tokens per second."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.console import human_bytes
from finetune.plan import phases
from finetune.plan.inputs import PlanInputs
from finetune.plan.product import device_memory, fits

if TYPE_CHECKING:
    from finetune.hardware import Machine

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)

DEQUANTIZE_TOKENS = 450
"""Making a 4-bit matrix dense takes as long as putting so many tokens through it: 4.5 bytes a weight are moved, a product
costs 2 operations a weight and token, and GPUs do about 200 operations in the time of a byte (A100: 312e12 / 1.6e12)."""

GATHER_TOKENS = 1250
"""The same for fetching a 4-bit matrix from another GPU over PCIe 4: half a byte a weight at 12 GB/s, against 60e12
operations a second that a consumer GPU reaches. Source: both from the 2x3090 machine in fsdp_qlora's benchmarks."""

SMALLEST_TOKENS = 256

MARGIN = 0.93
"""A proposal must hold, so it leaves room for the closed form's own error: 7 % for nine in ten of litgpt's published
figures. Source: scripts/check_plan.py."""


@dataclass(frozen=True)
class Candidate:
    """One set-up that was looked at."""

    inputs: PlanInputs
    speed: float
    bytes: float


def propose(inputs: PlanInputs, machine: Machine) -> list[str]:
    """The best set-up as overrides to paste, the runner-up and why not; or what stands in the way."""
    found: list[Candidate] = []
    tokens = inputs.tokens
    while not found and tokens >= SMALLEST_TOKENS:
        shorter = dataclasses.replace(inputs, tokens=tokens)
        found = [candidate for candidate in _candidates(shorter, machine) if _fits(candidate.inputs, machine)]
        tokens //= 2
    if not found:
        smallest = min(_candidates(dataclasses.replace(inputs, tokens=SMALLEST_TOKENS), machine), key=lambda c: c.bytes)
        return [
            f"nothing fits: even {overrides(inputs, smallest.inputs)} with {SMALLEST_TOKENS} tokens needs {human_bytes(smallest.bytes)}"
        ]
    # Of equal speed, the one that needs less: a share of speed below a percent is not known anyway.
    ranked = sorted(found, key=lambda c: (-round(c.speed, 2), c.bytes))
    best = ranked[0]
    sentences = [
        f"proposed: {overrides(inputs, best.inputs)}",
        f"it needs {human_bytes(best.bytes)} of {human_bytes(device_memory(best.inputs, machine))}",
    ]
    other = next((c for c in ranked if _kind(c.inputs) != _kind(best.inputs)), None)
    if other is not None:
        slower = 1 - other.speed / best.speed
        reason = f"about {slower:.0%} slower by the closed form" if slower >= 0.01 else "as fast, and it needs more memory"
        sentences.append(f"runner-up: {overrides(inputs, other.inputs)}, with {human_bytes(other.bytes)}: {reason}")
    return sentences


def overrides(before: PlanInputs, after: PlanInputs) -> str:
    """What has to be typed to get from one set-up to the other."""
    words = [f"train.micro_batch={after.rows}", f"train.checkpointing={'full' if after.checkpointing else 'none'}"]
    if after.tokens != before.tokens:
        words.append(f"data.max_tokens={after.tokens}")
    if (after.method, after.double) != (before.method, before.double):
        words.append("quantization=nf4_double")
    if after.optimizer != before.optimizer:
        words.append(f"optim={after.optimizer}")
    if (after.strategy, after.processes) != (before.strategy, before.processes):
        words += [f"launch={after.strategy}"] + ([f"launch.processes={after.processes}"] if after.processes > 1 else [])
    if after.offload != before.offload:
        words.append(f"launch.offload={str(after.offload).lower()}")
    return " ".join(words)


def relative_speed(inputs: PlanInputs) -> float:
    """Tokens per second in units of one device that only computes: passes through the weights, and what delays them."""
    passes = 3 if inputs.checkpointing else 2
    delay = DEQUANTIZE_TOKENS if inputs.method in ("nf4", "fp4") else 0
    if inputs.shards > 1:
        delay += GATHER_TOKENS * (2 if inputs.offload else 1) * (1 if inputs.method in ("nf4", "fp4") else 4)
    tokens = inputs.step_tokens
    return inputs.processes * tokens / (passes * (tokens + delay))


def _candidates(inputs: PlanInputs, machine: Machine) -> Iterator[Candidate]:
    for strategy, processes, offload in _launches(inputs, machine):
        for method, double in dict.fromkeys([(inputs.method, inputs.double), ("nf4", True)]):
            for checkpointing in (False, True):
                for rows in [rows for rows in MICRO_BATCHES if rows * processes <= max(inputs.step_rows, processes)]:
                    optimizer = "adamw" if strategy == "fsdp" and "bit" in inputs.optimizer else inputs.optimizer
                    tried = dataclasses.replace(
                        inputs, strategy=strategy, processes=processes, offload=offload, method=method, double=double,
                        checkpointing=checkpointing, rows=rows, optimizer=optimizer,
                    )  # fmt: skip
                    yield Candidate(tried, relative_speed(tried), phases.peak(tried))


def _launches(inputs: PlanInputs, machine: Machine) -> list[tuple[str, int, bool]]:
    """Strategy, processes and offload worth trying; shards only where there are several GPUs."""
    gpus = len(machine.gpus) if inputs.device == "cuda" else 1
    alone = [("single", 1, False)]
    return alone if gpus < 2 else [*alone, ("ddp", gpus, False), ("fsdp", gpus, False), ("fsdp", gpus, True)]


def _fits(inputs: PlanInputs, machine: Machine) -> bool:
    host = max(phases.host_bytes(inputs).values(), default=0.0)
    return fits(inputs, machine, host=host, memory=round(device_memory(inputs, machine) * MARGIN)) is True


def _kind(inputs: PlanInputs) -> tuple[str, bool, bool, str]:
    return (inputs.strategy, inputs.offload, inputs.checkpointing, inputs.method)
