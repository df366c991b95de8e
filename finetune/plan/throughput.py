"""How fast a machine trains: from earlier runs on it, or at best by a table of the makers' figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.architecture import layer_groups
from finetune.parameters import (
    embedding_parameters,
    expert_parameters,
    head_parameters,
    linear_layers,
    linear_parameters,
    parameters,
)
from finetune.plan.activations_saved import GATED_LAYERS
from finetune.plan.inputs import FLOAT, PlanInputs

if TYPE_CHECKING:
    from finetune.hardware import Machine

GPUS = {
    "H200": (989e12, 4800e9), "H100": (989e12, 3350e9), "A100": (312e12, 2039e9), "A6000": (155e12, 768e9),
    "A10G": (70e12, 600e9), "L40S": (362e12, 864e9), "L4": (121e12, 300e9), "T4": (65e12, 320e9),
    "V100": (125e12, 900e9), "5090": (210e12, 1792e9), "4090": (165e12, 1008e9), "3090": (71e12, 936e9),
    "4060 Ti": (44e12, 288e9), "4060": (30e12, 272e9), "3060": (26e12, 360e9),
}  # fmt: skip
"""Operations per second of dense 16-bit products with float32 sums, and memory bytes per second, by a part of the GPU's
name.
Source: NVIDIA's data sheets, and the appendices of its GA102, AD102 and Blackwell whitepapers for the GeForce cards."""

UNKNOWN_GPU = (70e12, 600e9)
"""A GPU that is not listed counts as slightly slower than an RTX 3090."""

CORE_OPERATIONS, TILE_OPERATIONS = 5e10, 1e12
"""Per second and CPU core, with AVX and with AMX; 2.1e12 to 2.5e12 were measured on two cores of an Intel CPU with
AMX."""

CPU_BANDWIDTH = 20e9
"""Bytes per second: one channel of DDR4-2666. Source: JEDEC, 8 bytes at 2,666 million transfers."""

UTILISATION = 0.4
"""Share of a maker's figure that training reaches. Source: PaLM paper (arXiv 2204.02311), table 3: 0.21 to 0.46 in
published runs."""

DEQUANTIZE_TOKENS = 450
"""Dequantizing a 4-bit matrix takes as long as multiplying it with this many tokens: 4.5 bytes per weight are moved, a
product costs 2 operations per weight and token, and GPUs do about 200 operations in the time of a byte (A100: 312e12 /
1.6e12)."""

GATHER_TOKENS = 1250
"""The same for fetching a 4-bit matrix from another GPU over PCIe 4: half a byte per weight at 12 GB/s, against the
60e12 operations per second that a consumer GPU reaches. Source: both from the 2x3090 machine in fsdp_qlora's
benchmarks."""


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """A finished run of the same model in the same dtype on this machine.

    Attributes:
        operations_per_second: What training reached on one device.
        seconds: Of the stages merge and eval, where they are done.
    """

    operations_per_second: float
    seconds: dict[str, float]


def table_throughput(inputs: PlanInputs, machine: Machine) -> float:
    """Returns tokens per second over all devices by the makers' figures: good to compare settings on one machine."""
    operations = stated_figures(inputs, machine)[0] * UTILISATION
    return operations * inputs.processes / token_operations(inputs) * busy_share(inputs)


def is_listed(inputs: PlanInputs, machine: Machine) -> bool:
    """Tells whether the maker's figures of the device are in the table."""
    return inputs.device == "cuda" and any(part in gpu.name for gpu in machine.gpus[:1] for part in GPUS)


def stated_figures(inputs: PlanInputs, machine: Machine) -> tuple[float, float]:
    """Returns the makers' operations and memory bytes per second of one device."""
    if inputs.device == "cpu":
        return machine.cores * (TILE_OPERATIONS if "amx_bf16" in machine.features else CORE_OPERATIONS), CPU_BANDWIDTH
    name = machine.gpus[0].name if machine.gpus else ""
    return next((figures for part, figures in GPUS.items() if part in name), UNKNOWN_GPU)


def token_operations(inputs: PlanInputs) -> float:
    """Returns the operations of one trained token: two per weight and pass, and its attention scores.

    A frozen weight takes a forward and a backward pass, a trained one another, and all of them one more under
    checkpointing.
    """
    a = inputs.architecture
    experts = expert_parameters(a)
    dense = parameters(a) - embedding_parameters(a) - head_parameters(a) - experts
    active = dense + experts * a.active_experts / max(1, a.experts)
    groups = [group for group, _ in layer_groups(a) if group.mixer == "attention"]
    width = sum(group.layers * group.heads * group.head_dim for group in groups)
    scores = 2 * width * inputs.tokens / 2  # half, since a token attends to earlier ones only
    return 2 * passes(inputs) * (active + embedding_parameters(a) + scores)


def passes(inputs: PlanInputs) -> float:
    """Returns the number of passes through the weights; what is recomputed counts by its share of the weights."""
    recomputed = 1.0 if inputs.checkpointing else 0.0
    if inputs.kernels.selective:
        gated = [linear.weights for linear in linear_layers(inputs.architecture) if linear.name in GATED_LAYERS]
        recomputed = sum(gated) / linear_parameters(inputs.architecture)
    return 2 + recomputed + inputs.extra_passes + (not inputs.rank)


def busy_share(inputs: PlanInputs) -> float:
    """Returns the share of time that products take; the rest is spent on dequantizing and fetching weights."""
    delay = DEQUANTIZE_TOKENS if inputs.packed_4bit and not inputs.kernels.cached and inputs.device == "cuda" else 0
    if inputs.shards > 1:
        delay += GATHER_TOKENS * (2 if inputs.offload else 1) * (1 if inputs.packed_4bit else 4)
    return inputs.step_tokens / (inputs.step_tokens + delay)


def earlier_runs(inputs: PlanInputs, machine: Machine, runs: Path) -> list[EarlierRun]:
    """Returns the finished trainings of the same model on this machine, in the same dtype.

    Args:
        inputs: The training configuration.
        machine: This machine.
        runs: Folder of the runs.
    """
    earlier = []
    for file in sorted(runs.glob("*/train/manifest.json")):
        run = file.parents[1]
        try:
            trained = json.loads(file.read_text(encoding="utf-8"))
            planned = json.loads((run / "plan" / "manifest.json").read_text(encoding="utf-8"))["product"]
            environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
            seconds = {stage: _seconds(run / stage / "manifest.json") for stage in ("merge", "eval")}
        except (OSError, ValueError, KeyError):
            continue  # a run of another version, or one that is being written
        speed = trained.get("product", {}).get("tokens_per_second")
        effort = planned.get("token_operations")
        same_model = planned.get("parameters") == parameters(inputs.architecture)
        sampled = "sample" in planned.get("phases", {})  # its speed is that of sampling, more than of training
        if speed and effort and same_model and not sampled and _same_machine(environment, machine, inputs):
            operations = speed * effort / max(1, planned.get("devices", 1))
            done = {stage: took for stage, took in seconds.items() if took}
            earlier.append(EarlierRun(operations_per_second=operations, seconds=done))
    return earlier


def _seconds(manifest: Path) -> float:
    if not manifest.is_file():
        return 0.0
    return float(json.loads(manifest.read_text(encoding="utf-8"))["seconds"])


def _same_machine(environment: dict[str, Any], machine: Machine, inputs: PlanInputs) -> bool:
    machine_then, placement = environment.get("machine", {}), environment.get("placement", {})
    gpus = [gpu.get("name") for gpu in machine_then.get("gpus", [])]
    return (
        placement.get("device") == inputs.device
        and (placement.get("dtype") == "float32") == (inputs.compute_bytes == FLOAT)
        and machine_then.get("cores") == machine.cores
        and gpus == [gpu.name for gpu in machine.gpus]
    )
