"""The plan: what a run needs, whether it fits, and the one change that would help most."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune.architecture import expert_parameters, parameters
from finetune.console import human_bytes
from finetune.plan import phases, weights
from finetune.plan.inputs import PlanInputs
from finetune.plan.phases import Terms

if TYPE_CHECKING:
    from finetune.hardware import Machine

SMALLEST_SHARE = 0.02
"""A change that saves less of the peak than this is not worth advice."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs.

    Attributes:
        known: Whether the model's dimensions are known; where not, ``notes`` says why and the rest is empty.
        device: ``cuda`` or ``cpu``.
        devices: How many of them.
        memory_bytes: What one device has; 0 where there is none.
        phases: Bytes on one device by phase and term.
        host: Bytes of host memory by phase; empty where the device is the host.
        disk: Bytes of disk by what they hold.
        peak_phase: The phase that needs most on one device, up to the end of training.
        peak_bytes: What it needs.
        largest_term: The largest part of it, and its bytes.
        parameters: Of the base model, and those that train.
        advice: The one change that saves most, as an override, and the bytes that it saves.
        needed_bytes: What must be there for training: the peak, on a GPU without the allocator's idle blocks.
        fits: Whether training fits in the memory of device and host; None where the machine's are not known.
        obstacle: Why it does not.
        seconds: Rough time of the stages train, merge and eval; train is missing where the data's size is not known.
        tokens_per_second: Of training, over all devices; rough.
        speed_source: Where that figure comes from.
        token_operations: What one trained token costs; later plans on this machine learn its speed from it.
        exact: Each term in closed form and as it was counted, in bytes; empty without ``plan.exact``.
        notes: Sentences worth reading.
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
    """Puts the closed form's figures beside the machine; time, count and proposal are added by whoever asks for them."""
    by_phase = phases.device_phases(inputs)
    training = {phase: terms for phase, terms in by_phase.items() if phase not in phases.AFTER_TRAINING}
    peak_phase = max(training, key=lambda phase: phases.total(training[phase]))
    peak = phases.total(training[peak_phase])
    largest = max(training[peak_phase], key=lambda term: training[peak_phase][term])
    disk = phases.disk_bytes(inputs, checkpoints=checkpoints)
    host = phases.host_bytes(inputs)
    memory = device_memory(inputs, machine)
    advice, saves = best_change(inputs)
    stands = obstacle(inputs, machine, host=max(host.values(), default=0.0), memory=memory)
    return Plan(
        known=True,
        device=inputs.device,
        devices=inputs.processes,
        memory_bytes=memory,
        phases={phase: _whole(terms) for phase, terms in by_phase.items()},
        host=_whole(host),
        disk=_whole(disk),
        peak_phase=peak_phase,
        peak_bytes=round(peak),
        largest_term=largest,
        largest_term_bytes=round(training[peak_phase][largest]),
        parameters=weights.dense_bytes(inputs) // 2,
        trainable_parameters=weights.trainable_parameters(inputs),
        advice=advice,
        advice_saves_bytes=round(saves),
        needed_bytes=round(phases.needed(inputs)),
        fits=not stands if memory else None,
        obstacle=stands,
        notes=_notes(
            inputs,
            machine,
            disk=phases.total(disk),
            after={phase: phases.total(by_phase[phase]) for phase in phases.AFTER_TRAINING},
            memory=memory,
        ),
    )


def best_change(inputs: PlanInputs) -> tuple[str, float]:
    """The override that saves most of the peak without changing what is learnt, and its bytes; empty where none helps."""
    before = phases.peak(inputs)
    savings = {override: before - phases.peak(other) for override, other in changes(inputs).items()}
    best = max(savings, key=lambda override: savings[override], default="")
    return (best, savings[best]) if best and savings[best] >= SMALLEST_SHARE * before else ("", 0.0)


def changes(inputs: PlanInputs) -> dict[str, PlanInputs]:
    """Overrides that leave the result of training as it is, or nearly."""
    replace = dataclasses.replace
    found: dict[str, PlanInputs] = {}
    if not inputs.checkpointing:
        found["train.checkpointing=full"] = replace(inputs, checkpointing=True)
    if inputs.rows > 1:
        found[f"train.micro_batch={inputs.rows // 2}"] = replace(inputs, rows=inputs.rows // 2)
    if inputs.method not in ("nf4", "fp4"):
        found["quantization=nf4_double"] = replace(inputs, method="nf4", double=True)
    elif not inputs.double:
        found["quantization=nf4_double"] = replace(inputs, double=True)
    if not inputs.optimizer.endswith("_8bit"):
        found["optim=paged_adamw_8bit"] = replace(inputs, optimizer="paged_adamw_8bit")
    if inputs.upcast == "all":
        found["model.upcast=none"] = replace(inputs, upcast="none")
    if inputs.dropout and not inputs.checkpointing:
        found["lora.dropout=0"] = replace(inputs, dropout=False)
    return found


def device_memory(inputs: PlanInputs, machine: Machine) -> int:
    if inputs.device == "cpu":
        return machine.ram_bytes
    return min((gpu.memory_bytes for gpu in machine.gpus[: inputs.processes]), default=0)


def obstacle(inputs: PlanInputs, machine: Machine, *, host: float, memory: int) -> str:
    """Why training does not fit in the memory of device and host; empty where it does, or where there is no device."""
    if not memory:
        return ""
    if inputs.device == "cuda" and len(machine.gpus) < inputs.processes:
        here = "1 GPU" if len(machine.gpus) == 1 else f"{len(machine.gpus)} GPUs"
        return f"launch.processes={inputs.processes}, but the machine has {here}"
    needed, usable = phases.needed(inputs), memory * _usable(inputs)
    if needed > usable:
        return f"{human_bytes(needed)} must be there and a process gets {human_bytes(usable)} of {human_bytes(memory)}"
    if machine.ram_bytes and host > machine.ram_bytes:
        return f"the host needs {human_bytes(host)} and has {human_bytes(machine.ram_bytes)}"
    return ""


def _usable(inputs: PlanInputs) -> float:
    return phases.USABLE_SHARE if inputs.device == "cuda" else 1.0


def _notes(inputs: PlanInputs, machine: Machine, *, disk: float, after: dict[str, float], memory: int) -> list[str]:
    notes = []
    if disk > machine.disk_free_bytes:
        notes.append(f"the disk needs {human_bytes(disk)} in all and has {human_bytes(machine.disk_free_bytes)} left")
    notes += [
        _too_large(phase, size, inputs, memory=memory)
        for phase, size in after.items()
        if memory and size > memory * _usable(inputs)
    ]
    if inputs.architecture.experts and inputs.method != "none":
        notes.append(_experts(inputs))
    return notes


def _too_large(phase: str, size: float, inputs: PlanInputs, *, memory: int) -> str:
    """A stage after training that does not fit, and what would help."""
    need = f"{phase} needs {human_bytes(size)} for the dense model"
    rows = inputs.answer_rows
    while phase == "eval" and rows > 1:
        rows //= 2
        fewer = phases.device_phases(dataclasses.replace(inputs, answer_rows=rows))["eval"]
        if phases.total(fewer) <= memory * _usable(inputs):
            return f"{need} and {inputs.answer_rows} answers at a time, more than this device has: eval.batch_rows={rows} fits"
    return f"{need}, more than this device has: run.until=train here, and the rest elsewhere"


def _experts(inputs: PlanInputs) -> str:
    """What it costs that bitsandbytes quantizes `nn.Linear` only."""
    a = inputs.architecture
    fused = expert_parameters(a)
    dense = fused * inputs.stored_bytes
    small = sum(
        weights.quantized_bytes(inputs, fused, rows=a.layers * a.experts * (2 * a.intermediate_size + a.hidden_size))
    )
    return (
        f"experts are fused parameters, which bitsandbytes leaves in 16 bit: {fused / parameters(a):.0%} of the model is not quantized. "
        f"They take {human_bytes(dense)}; as {inputs.method} they would take {human_bytes(small)}, {human_bytes(dense - small)} less"
    )


def _whole(terms: Terms) -> dict[str, int]:
    return {name: round(size) for name, size in terms.items()}
