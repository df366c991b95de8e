"""Finds settings that fit: of all that fit the machine, those with the most tokens per second."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.console import human_bytes
from finetune.kernels.forms import FUSED_FAMILIES
from finetune.plan import phases
from finetune.plan.inputs import PlanInputs
from finetune.plan.product import LARGEST_ERROR, can_halve, device_memory, obstacle
from finetune.plan.throughput import table_throughput
from finetune.quantization.config import PREQUANTIZED

if TYPE_CHECKING:
    from finetune.hardware import Machine

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
SMALLEST_TOKENS = 256
MARGIN = 0.93
"""Share of the memory that settings may use, because the closed form errs: by up to 7 % for nine in ten of litgpt's
published figures. Source: benchmarks/check_plan.py."""

FIRM_MARGIN = 1 / (1 + LARGEST_ERROR)
"""The same where training could not halve its micro-batch when memory runs out."""

SAME_SPEED = 0.01
"""Relative difference of speed that the estimate cannot resolve."""


@dataclass(frozen=True)
class Candidate:
    """A possible configuration, with its tokens per second and its bytes on one device."""

    inputs: PlanInputs
    speed: float
    bytes: float


def propose(inputs: PlanInputs, machine: Machine) -> list[str]:
    """Returns the best configuration as overrides, and the runner-up with its drawback; or says that nothing fits."""
    candidates, fitting = search(inputs, machine)
    if not fitting:
        smallest = min(_candidates(dataclasses.replace(inputs, tokens=SMALLEST_TOKENS), machine), key=lambda c: c.bytes)
        return [
            f"nothing fits: even {overrides(inputs, smallest.inputs)} with {SMALLEST_TOKENS} tokens needs "
            f"{human_bytes(smallest.bytes)} on a device with {human_bytes(device_memory(smallest.inputs, machine))}"
        ]
    best = fitting[0]
    memory = human_bytes(device_memory(best.inputs, machine))
    speed = f"{best.speed:,.0f} tokens/s"
    sentences = [
        f"proposed: {overrides(inputs, best.inputs)}",
        f"it needs {human_bytes(best.bytes)} of {memory} and trains at best {speed}; {_longest(best, machine)}",
    ]
    others = sorted(
        fitting[1:], key=lambda c: _kind(c.inputs) == _kind(best.inputs)
    )  # one of another kind is more informative
    other = next(iter(others), None)
    if other is not None:
        slower = 1 - other.speed / best.speed
        reason = f"about {slower:.0%} slower" if slower >= SAME_SPEED else "as fast"
        compared = "more" if other.bytes > best.bytes else "less"
        sentences.append(
            f"runner-up: {overrides(inputs, other.inputs)}: {reason}, with {human_bytes(other.bytes)}, {compared} "
            f"memory"
        )
    return sentences + _too_large(inputs, candidates, best)


def search(inputs: PlanInputs, machine: Machine) -> tuple[list[Candidate], list[Candidate]]:
    """Returns all configurations of the longest rows of which some fit, and those that fit, the best first."""
    candidates: list[Candidate] = []
    tokens = inputs.tokens
    while tokens >= SMALLEST_TOKENS:
        candidates = list(_candidates(dataclasses.replace(inputs, tokens=tokens), machine))
        fitting = [candidate for candidate in candidates if _fits(candidate.inputs, machine)]
        if fitting:
            return candidates, _ranked(fitting, inputs)
        tokens //= 2
    return candidates, []


def fit_step(inputs: PlanInputs, machine: Machine, *, choose: frozenset[str]) -> PlanInputs:
    """Returns the inputs with the micro-batch, the checkpointing, or both, that fit the device and train fastest.

    Where nothing fits, one row and full checkpointing, which need least.

    Args:
        inputs: The training configuration.
        machine: The machine.
        choose: ``micro_batch``, ``checkpointing`` or both.
    """
    modes = _checkpointings(inputs) if "checkpointing" in choose else [checkpointing(inputs)]
    rows = [inputs.rows]
    if "micro_batch" in choose:
        rows = [count for count in MICRO_BATCHES if count == 1 or _is_used(count, inputs)]
    candidates = [
        _candidate(_with_step(inputs, rows=count, mode=mode), machine) for count, mode in itertools.product(rows, modes)
    ]
    fitting = [candidate for candidate in candidates if _fits(candidate.inputs, machine)]
    if not fitting:
        return min(candidates, key=lambda candidate: candidate.bytes).inputs
    return _ranked(fitting, inputs)[0].inputs


def overrides(before: PlanInputs, after: PlanInputs) -> str:
    """Returns the overrides that change one configuration into the other."""
    words = [f"train.micro_batch={after.rows}", f"train.checkpointing={checkpointing(after)}"]
    if after.tokens != before.tokens:
        words.append(f"data.max_tokens={after.tokens - after.sampled_tokens} data.pack_tokens=null")
    if (after.method, after.double) != (before.method, before.double):
        words.append("quantization=nf4_double")
    if after.optimizer != before.optimizer:
        words.append(f"optim={'adamw' if after.optimizer == 'adamw_torch' else after.optimizer}")
    if (after.strategy, after.processes) != (before.strategy, before.processes):
        words += [f"launch={after.strategy}"] + ([f"launch.processes={after.processes}"] if after.processes > 1 else [])
    if after.offload != before.offload:
        words.append(f"launch.offload={str(after.offload).lower()}")
    return " ".join(words)


def checkpointing(inputs: PlanInputs) -> str:
    """Returns the value of ``train.checkpointing``."""
    if inputs.checkpointing:
        return "offloaded" if inputs.offload_activations else "full"
    return "selective" if inputs.kernels.selective else "none"


def _ranked(candidates: list[Candidate], inputs: PlanInputs) -> list[Candidate]:
    """Sorts by speed, at equal speed by changed settings, then by memory; what is copied to the host comes last."""
    top = max(candidate.speed for candidate in candidates)

    def rank(candidate: Candidate) -> tuple[bool, float, int, float]:
        after = candidate.inputs
        changed = sum(getattr(after, name) != getattr(inputs, name) for name in ("method", "optimizer", "strategy"))
        return (after.offload_activations, -round(candidate.speed / top / SAME_SPEED), changed, candidate.bytes)

    return sorted(candidates, key=rank)


def _candidates(inputs: PlanInputs, machine: Machine) -> Iterator[Candidate]:
    """Yields every combination of launch, quantization, checkpointing, optimizer and micro-batch."""
    is_stored = inputs.method == PREQUANTIZED
    combinations = itertools.product(
        _launches(inputs, machine),
        dict.fromkeys([(inputs.method, inputs.double), *([] if is_stored else [("nf4", True)])]),
        _checkpointings(inputs),
        dict.fromkeys([inputs.optimizer, "paged_adamw_8bit"]),
        MICRO_BATCHES,
    )
    for (strategy, processes, offload), (method, double), mode, optimizer, rows in combinations:
        kernels = dataclasses.replace(
            inputs.kernels,
            fused=inputs.kernels.fused and strategy != "fsdp",
            cached=inputs.kernels.fused and inputs.device == "cpu" and method in ("nf4", PREQUANTIZED),
        )
        candidate = dataclasses.replace(
            inputs,
            strategy=strategy,
            processes=processes,
            offload=offload,
            method=method,
            double=double,
            kernels=kernels,
            optimizer=optimizer,
        )
        if _is_used(rows, candidate):
            yield _candidate(_with_step(candidate, rows=rows, mode=mode), machine)


def _candidate(inputs: PlanInputs, machine: Machine) -> Candidate:
    return Candidate(inputs, table_throughput(inputs, machine), phases.peak(inputs))


def _with_step(inputs: PlanInputs, *, rows: int, mode: str) -> PlanInputs:
    return dataclasses.replace(
        inputs,
        rows=rows,
        checkpointing=mode in ("full", "offloaded"),
        offload_activations=mode == "offloaded",
        kernels=dataclasses.replace(inputs.kernels, selective=mode == "selective"),
    )


def _is_used(rows: int, inputs: PlanInputs) -> bool:
    """Returns whether an optimizer step reads enough rows to fill a micro-batch in every process."""
    return rows * inputs.processes <= max(inputs.step_rows, inputs.processes)


def _checkpointings(inputs: PlanInputs) -> list[str]:
    """Returns the values of ``train.checkpointing`` that this model and device allow."""
    selective = ["selective"] if inputs.architecture.family in FUSED_FAMILIES else []
    offloaded = ["offloaded"] if inputs.device == "cuda" else []
    return ["none", *selective, "full", *offloaded]


def _launches(inputs: PlanInputs, machine: Machine) -> list[tuple[str, int, bool]]:
    """Strategy, processes and offload worth trying; shards only where there are several GPUs."""
    gpus = len(machine.gpus) if inputs.device == "cuda" else 1
    alone = [("single", 1, False)]
    return alone if gpus < 2 else [*alone, ("ddp", gpus, False), ("fsdp", gpus, False), ("fsdp", gpus, True)]


def _fits(inputs: PlanInputs, machine: Machine) -> bool:
    host = max(phases.host_bytes(inputs).values(), default=0.0)
    memory = round(device_memory(inputs, machine) * _margin(inputs))
    return memory > 0 and not obstacle(inputs, machine, host=host, memory=memory)


def _margin(inputs: PlanInputs) -> float:
    """Returns the share of the memory that settings may use.

    More where training can still halve its micro-batch, and for one row with full checkpointing, which needs least.
    """
    has_less = can_halve(inputs) if inputs.rows > 1 else inputs.checkpointing
    return MARGIN if has_less else FIRM_MARGIN


def _longest(best: Candidate, machine: Machine) -> str:
    """The longest row that this set-up has room for, one at a time."""
    tokens, limit = best.inputs.tokens, best.inputs.architecture.max_positions
    while tokens * 2 <= limit and _fits(dataclasses.replace(best.inputs, rows=1, tokens=tokens * 2), machine):
        tokens *= 2
    if tokens == best.inputs.tokens:
        return "longer rows do not fit"
    return f"with train.micro_batch=1 data.max_tokens={tokens - best.inputs.sampled_tokens} would fit too"


def _too_large(inputs: PlanInputs, tried: list[Candidate], best: Candidate) -> list[str]:
    """What would be faster and does not fit: the next thing that a larger machine would allow."""
    faster = [c for c in tried if c.speed > best.speed * (1 + SAME_SPEED) and c.inputs.method == best.inputs.method]
    if not faster:
        return []
    nearest = min(faster, key=lambda c: c.bytes)
    gain = nearest.speed / best.speed - 1
    return [
        f"faster by about {gain:.0%}, but it needs {human_bytes(nearest.bytes)}: {overrides(inputs, nearest.inputs)}"
    ]


def _kind(inputs: PlanInputs) -> tuple[str, bool, str, str]:
    return (inputs.strategy, inputs.offload, checkpointing(inputs), inputs.method)
