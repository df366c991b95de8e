"""The plan: whether a run fits, what it needs, and the one change that would help most."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune.console import human_bytes
from finetune.errors import HardwareError
from finetune.parameters import expert_parameters, parameters
from finetune.plan import later, phases, weights
from finetune.plan.inputs import PlanInputs
from finetune.plan.phases import Terms
from finetune.quantization.config import PREQUANTIZED

if TYPE_CHECKING:
    from finetune.hardware import Machine

SMALLEST_SHARE = 0.02
"""A change that saves less of the peak than this is not worth advice."""


LARGEST_ERROR = 0.19
"""The closed form errs by less for nine in ten of all published figures. Source: benchmarks/check_plan.py."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory, disk and time of a run.

    Attributes:
        known: Whether the model's dimensions are known; where not, ``notes`` says why and the rest is empty.
        verdict: One line: whether training fits, and with how much to spare.
        device: ``cuda`` or ``cpu``.
        devices: Number of devices.
        memory_bytes: Memory of one device; 0 where there is no such device.
        phases: Bytes on one device by phase and term.
        host: Bytes of host memory by phase; empty where the device is the host.
        disk: Bytes of disk space by content.
        peak_phase: The phase with the most bytes on one device, up to the end of training.
        peak_bytes: Its bytes.
        largest_term: The largest term of it; its bytes are in ``largest_term_bytes``.
        parameters: Of the base model; ``trainable_parameters`` of the adapter.
        advice: The one change that saves most, as an override; it saves ``advice_saves_bytes``.
        needed_bytes: Least memory for training: the peak, on a GPU without the allocator's idle blocks.
        least_bytes: The same with the smallest micro-batch that training falls back to when memory runs out.
        spare_bytes: Memory that training leaves to a process on one device; negative where it does not fit.
        fits: Whether training fits in the memory of device and host; None where the machine's are not known.
        obstacle: Why it does not fit.
        micro_batch: Rows of one forward pass; with ``checkpointing``, as set or as ``auto`` chooses.
        chosen: What ``auto`` chose and why; empty where both are set, as they are in a run.
        later: How each stage after training runs on this device.
        seconds: Time of the stages train, merge and eval, as far as it is known.
        tokens_per_second: Of training, over all devices; 0 where it is not known.
        speed_source: Where ``seconds`` and ``tokens_per_second`` come from, or that they are not known.
        speed_is_measured: Whether that is a measurement; otherwise a run is slower.
        token_operations: Operations of one trained token, from which later plans on this machine derive its speed.
        exact: Each term in closed form and as counted, in bytes; empty without ``plan.exact``.
        notes: Warnings and remarks.
        proposal: Sentences of ``plan.fit``.
    """

    known: bool
    verdict: str = ""
    device: str = ""
    devices: int = 0
    memory_bytes: int = 0
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    peak_phase: str = ""
    peak_bytes: int = 0
    largest_term: str = ""
    largest_term_bytes: int = 0
    parameters: int = 0
    trainable_parameters: int = 0
    advice: str = ""
    advice_saves_bytes: int = 0
    needed_bytes: int = 0
    least_bytes: int = 0
    spare_bytes: int = 0
    fits: bool | None = None
    obstacle: str = ""
    micro_batch: int = 0
    checkpointing: str = ""
    chosen: list[str] = field(default_factory=list)
    later: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    speed_source: str = ""
    speed_is_measured: bool = False
    token_operations: float = 0.0
    exact: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    proposal: list[str] = field(default_factory=list)


def make_plan(inputs: PlanInputs, machine: Machine, *, checkpoints: int) -> Plan:
    """Compares the closed form's figures with the machine; the caller adds time, count and proposal."""
    memory = device_memory(inputs, machine)
    by_phase = phases.device_phases(inputs, memory=memory, host=machine.ram_bytes)
    training = {phase: terms for phase, terms in by_phase.items() if phase not in phases.AFTER_TRAINING}
    peak_phase = max(training, key=lambda phase: phases.total(training[phase]))
    peak = phases.total(training[peak_phase])
    largest = max(training[peak_phase], key=lambda term: training[peak_phase][term])
    disk = phases.disk_bytes(inputs, checkpoints=checkpoints)
    host = phases.host_bytes(inputs)
    advice, saves = best_change(inputs)
    problem = obstacle(inputs, machine, host=max(host.values(), default=0.0), memory=memory)
    spare = usable_bytes(inputs, machine) - phases.needed(inputs) if memory else 0.0
    return Plan(
        known=True,
        verdict=verdict(inputs, memory=memory, spare=spare, problem=problem),
        device=inputs.device,
        devices=inputs.processes,
        memory_bytes=memory,
        phases={phase: _rounded(terms) for phase, terms in by_phase.items()},
        host=_rounded(host),
        disk=_rounded(disk),
        peak_phase=peak_phase,
        peak_bytes=round(peak),
        largest_term=largest,
        largest_term_bytes=round(training[peak_phase][largest]),
        parameters=weights.dense_bytes(inputs) // 2,
        trainable_parameters=weights.trainable_parameters(inputs),
        advice=advice,
        advice_saves_bytes=round(saves),
        needed_bytes=round(phases.needed(inputs)),
        least_bytes=round(phases.needed(dataclasses.replace(inputs, rows=1) if can_halve(inputs) else inputs)),
        spare_bytes=round(spare),
        fits=not problem if memory else None,
        obstacle=problem,
        micro_batch=inputs.rows,
        later={phase: _later_text(inputs, machine, phase, by_phase[phase]) for phase in phases.AFTER_TRAINING},
        notes=_notes(inputs, machine, disk=phases.total(disk)),
    )


def require_fit(plan: Plan, *, unless: bool = False, free: int = 0) -> None:
    """Refuses a run before anything is downloaded where training cannot fit, even if the plan errs.

    Args:
        plan: The plan.
        unless: Whether the user wants to try anyway.
        free: Memory of the device that other programs leave; 0 where it is not known.

    Raises:
        HardwareError: The least that training needs is far more than the device has, or than others leave of it;
            ``preflight=off`` runs it anyway.
    """
    if not unless and free and plan.fits and plan.least_bytes > free * (1 + LARGEST_ERROR):
        raise HardwareError(
            f"plan: training needs at least {human_bytes(plan.least_bytes)}, and other programs leave "
            f"{human_bytes(free)} of the GPU's {human_bytes(plan.memory_bytes)} (`nvidia-smi` lists them); end them, "
            "choose another GPU with CUDA_VISIBLE_DEVICES, or try anyway with preflight=off"
        )
    if not unless and plan.fits is False and plan.least_bytes > plan.memory_bytes * (1 + LARGEST_ERROR):
        raise HardwareError(
            f"plan: {plan.verdict}; `finetune plan --fit` proposes settings that fit, and preflight=off tries it anyway"
        )


def verdict(inputs: PlanInputs, *, memory: int, spare: float, problem: str) -> str:
    """Returns the plan in one line: ``fits in 12.0 GiB with 2.1 GiB to spare``."""
    if not memory:
        return f"training needs {human_bytes(phases.needed(inputs))}; this machine has no such device to compare with"
    if problem:
        return f"does not fit: {problem}"
    each = f" on each of {inputs.processes} devices" if inputs.processes > 1 else ""
    return f"fits in {human_bytes(memory)} with {human_bytes(spare)} to spare{each}"


def best_change(inputs: PlanInputs) -> tuple[str, float]:
    """Returns the override that saves most of the peak at the same result, and its bytes; empty where none helps."""
    before = phases.peak(inputs)
    savings = {override: before - phases.peak(other) for override, other in changes(inputs).items()}
    best = max(savings, key=lambda override: savings[override], default="")
    return (best, savings[best]) if best and savings[best] >= SMALLEST_SHARE * before else ("", 0.0)


def changes(inputs: PlanInputs) -> dict[str, PlanInputs]:
    """Returns overrides that do not change the result of training, or hardly."""
    replace = dataclasses.replace
    variants: dict[str, PlanInputs] = {}
    if not inputs.checkpointing:
        variants["train.checkpointing=full"] = replace(inputs, checkpointing=True)
    if inputs.rows > 1:
        variants[f"train.micro_batch={inputs.rows // 2}"] = replace(inputs, rows=inputs.rows // 2)
    if inputs.method not in ("nf4", "fp4", PREQUANTIZED):
        variants["quantization=nf4_double"] = replace(inputs, method="nf4", double=True)
    elif not inputs.double and inputs.method != PREQUANTIZED:
        variants["quantization=nf4_double"] = replace(inputs, double=True)
    if not inputs.optimizer.endswith("_8bit"):
        variants["optim=paged_adamw_8bit"] = replace(inputs, optimizer="paged_adamw_8bit")
    if inputs.upcast == "all":
        variants["model.upcast=none"] = replace(inputs, upcast="none")
    if inputs.dropout and not inputs.checkpointing:
        variants["lora.dropout=0"] = replace(inputs, dropout=False)
    return variants


def device_memory(inputs: PlanInputs, machine: Machine) -> int:
    """Returns the memory of one device; 0 where there is no such device."""
    if inputs.device == "cpu":
        return machine.ram_bytes
    return min((gpu.memory_bytes for gpu in machine.gpus[: inputs.processes]), default=0)


def obstacle(inputs: PlanInputs, machine: Machine, *, host: float, memory: int) -> str:
    """Explains why training does not fit in device and host memory; empty where it fits or there is no device."""
    if not memory:
        return ""
    if inputs.device == "cuda" and len(machine.gpus) < inputs.processes:
        gpus = "1 GPU" if len(machine.gpus) == 1 else f"{len(machine.gpus)} GPUs"
        return f"launch.processes={inputs.processes}, but the machine has {gpus}"
    needed, usable = phases.needed(inputs), memory * _usable_share(inputs)
    if needed > usable:
        return f"training needs {human_bytes(needed)} and a process gets {human_bytes(usable)} of {human_bytes(memory)}"
    if machine.ram_bytes and host > machine.ram_bytes:
        return f"the host needs {human_bytes(host)} and has {human_bytes(machine.ram_bytes)}"
    return ""


def can_halve(inputs: PlanInputs) -> bool:
    """Returns whether training can halve its micro-batch when memory runs out.

    A shard's owner cannot stop alone, and where the device is the host the system ends the process instead.
    """
    return inputs.device == "cuda" and inputs.shards == 1


def usable_bytes(inputs: PlanInputs, machine: Machine) -> float:
    """Returns what a process gets of one device's memory; 0 where there is no such device."""
    return device_memory(inputs, machine) * _usable_share(inputs)


def _usable_share(inputs: PlanInputs) -> float:
    return phases.USABLE_SHARE if inputs.device == "cuda" else 1.0


def _later_text(inputs: PlanInputs, machine: Machine, phase: str, terms: Terms) -> str:
    """Describes how a stage after training runs: none of them decides whether training may start."""
    placed = phases.later_placement(inputs, phase, memory=device_memory(inputs, machine), host=machine.ram_bytes)
    how = later.text(inputs, phase, placed)
    return f"{human_bytes(phases.total(terms))}{f', {how}' if how else ''}"


def _notes(inputs: PlanInputs, machine: Machine, *, disk: float) -> list[str]:
    notes = []
    if disk > machine.disk_free_bytes:
        notes.append(
            f"the run needs {human_bytes(disk)} of disk space and {human_bytes(machine.disk_free_bytes)} are free"
        )
    if inputs.architecture.experts and inputs.method != "none" and not inputs.split_experts():
        notes.append(_experts(inputs))
    if inputs.experts != "none":
        notes.append(
            f"the adapter of experts (lora.experts={inputs.experts}) fits the layers that this project makes of "
            "them: the files are peft's, and export=adapter gives code that loads them; plain peft alone does not. The "
            "merged model is a plain one"
        )
    return notes


def _experts(inputs: PlanInputs) -> str:
    """Describes the cost of experts that stay in 16 bit."""
    a = inputs.architecture
    fused = expert_parameters(a)
    dense = fused * inputs.stored_bytes
    small = sum(weights.quantized_bytes(dataclasses.replace(inputs, method="nf4", double=True), fused, rows=0))
    return (
        f"experts are quantized by nf4 and fp4 only: {fused / parameters(a):.0%} of the model is not quantized with "
        f"{inputs.method}. They take {human_bytes(dense)}; with quantization=nf4_double they would take "
        f"{human_bytes(small)}, {human_bytes(dense - small)} less"
    )


def _rounded(terms: Terms) -> dict[str, int]:
    return {name: round(size) for name, size in terms.items()}
