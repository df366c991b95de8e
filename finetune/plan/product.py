"""The plan: what a run needs, whether it fits, and the one change that would help most."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune.architecture import expert_parameters, parameters
from finetune.console import human_bytes
from finetune.plan import later, phases, weights
from finetune.plan.inputs import PlanInputs
from finetune.plan.phases import Terms

if TYPE_CHECKING:
    from finetune.hardware import Machine

SMALLEST_SHARE = 0.02
"""A change that saves less of the peak than this is not worth advice."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory, disk and time of a run.

    Attributes:
        known: Whether the model's dimensions are known; where not, ``notes`` says why and the rest is empty.
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
        fits: Whether training fits in the memory of device and host; None where the machine's are not known.
        obstacle: Why it does not fit.
        seconds: Rough time of the stages train, merge and eval; train is missing where the data's size is not known.
        tokens_per_second: Of training, over all devices; rough.
        speed_source: Where ``tokens_per_second`` comes from.
        token_operations: Operations of one trained token, from which later plans on this machine derive its speed.
        exact: Each term in closed form and as counted, in bytes; empty without ``plan.exact``.
        notes: Warnings and remarks.
        proposal: Sentences of ``plan.fit``.
    """

    known: bool
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
    fits: bool | None = None
    obstacle: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    speed_source: str = ""
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
    return Plan(
        known=True,
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
        fits=not problem if memory else None,
        obstacle=problem,
        notes=_notes(inputs, machine, disk=phases.total(disk), memory=memory),
    )


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
    if inputs.method not in ("nf4", "fp4"):
        variants["quantization=nf4_double"] = replace(inputs, method="nf4", double=True)
    elif not inputs.double:
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
    needed, usable = phases.needed(inputs), memory * _usable(inputs)
    if needed > usable:
        return f"{human_bytes(needed)} are needed and a process gets {human_bytes(usable)} of {human_bytes(memory)}"
    if machine.ram_bytes and host > machine.ram_bytes:
        return f"the host needs {human_bytes(host)} and has {human_bytes(machine.ram_bytes)}"
    return ""


def _usable(inputs: PlanInputs) -> float:
    return phases.USABLE_SHARE if inputs.device == "cuda" else 1.0


def _notes(inputs: PlanInputs, machine: Machine, *, disk: float, memory: int) -> list[str]:
    notes = []
    if disk > machine.disk_free_bytes:
        notes.append(
            f"the run needs {human_bytes(disk)} of disk space and {human_bytes(machine.disk_free_bytes)} are free"
        )
    for phase in phases.AFTER_TRAINING if memory else ():
        placed = phases.later_placement(inputs, phase, memory=memory, host=machine.ram_bytes)
        if how := later.text(inputs, phase, placed):
            notes.append(f"{phase} {how}")
    if inputs.architecture.experts and inputs.method != "none":
        notes.append(_experts(inputs))
    return notes


def _experts(inputs: PlanInputs) -> str:
    """Describes the cost of bitsandbytes quantizing `nn.Linear` only."""
    a = inputs.architecture
    fused = expert_parameters(a)
    dense = fused * inputs.stored_bytes
    small = sum(
        weights.quantized_bytes(inputs, fused, rows=a.layers * a.experts * (2 * a.intermediate_size + a.hidden_size))
    )
    return (
        "experts are fused parameters, which bitsandbytes leaves in 16 bit: "
        f"{fused / parameters(a):.0%} of the model is not quantized. They take {human_bytes(dense)}; "
        f"as {inputs.method} they would take {human_bytes(small)}, {human_bytes(dense - small)} less"
    )


def _rounded(terms: Terms) -> dict[str, int]:
    return {name: round(size) for name, size in terms.items()}
