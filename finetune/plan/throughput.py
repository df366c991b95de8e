"""Estimates how fast a machine trains: from earlier runs on it, or from a table of the makers' figures."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.architecture import (
    embedding_parameters,
    expert_parameters,
    head_parameters,
    linear_layers,
    linear_parameters,
    parameters,
)
from finetune.plan.activations_saved import GATED_LAYERS
from finetune.plan.inputs import PlanInputs

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
class Throughput:
    """An estimate of training speed.

    Attributes:
        tokens_per_second: Of training, over all devices.
        operations_per_second: What training reaches on one device.
        bandwidth: Memory bytes per second of one device.
        source: Where the figure comes from.
    """

    tokens_per_second: float
    operations_per_second: float
    bandwidth: float
    source: str


def throughput(inputs: PlanInputs, machine: Machine, *, runs: Path | None) -> Throughput:
    """Estimates the speed of training.

    Args:
        inputs: The training configuration.
        machine: This machine, or a named one.
        runs: Folder of earlier runs on this machine; None where the machine is only named.
    """
    stated, bandwidth = stated_figures(inputs, machine)
    effort = token_operations(inputs)
    speeds = earlier_speeds(machine, runs, device=inputs.device) if runs else []
    if speeds:
        operations = statistics.median(speeds)
        return Throughput(
            tokens_per_second=operations * inputs.processes / effort,
            operations_per_second=operations,
            bandwidth=bandwidth,
            source=f"{len(speeds)} earlier run{'s' if len(speeds) > 1 else ''} on this machine",
        )
    operations = stated * UTILISATION
    return Throughput(
        tokens_per_second=operations * inputs.processes / effort * busy_share(inputs),
        operations_per_second=operations,
        bandwidth=bandwidth,
        source=f"a table: {stated / 1e12:.3g}e12 operations per second, of which training reaches {UTILISATION:.0%}",
    )


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
    scores = a.layers * 2 * a.heads * a.head_dim * inputs.tokens / 2  # half, since a token attends to earlier ones only
    return 2 * passes(inputs) * (active + embedding_parameters(a) + scores)


def passes(inputs: PlanInputs) -> float:
    """Returns the number of passes through the weights; what is recomputed counts by its share of the weights."""
    recomputed = 1.0 if inputs.checkpointing else 0.0
    if inputs.kernels.selective:
        gated = [linear.weights for linear in linear_layers(inputs.architecture) if linear.name in GATED_LAYERS]
        recomputed = sum(gated) / linear_parameters(inputs.architecture)
    return 2 + recomputed + (not inputs.rank)


def busy_share(inputs: PlanInputs) -> float:
    """Returns the share of time that products take; the rest is spent on dequantizing and fetching weights."""
    delay = DEQUANTIZE_TOKENS if inputs.packed_4bit and not inputs.kernels.cached and inputs.device == "cuda" else 0
    if inputs.shards > 1:
        delay += GATHER_TOKENS * (2 if inputs.offload else 1) * (1 if inputs.packed_4bit else 4)
    return inputs.step_tokens / (inputs.step_tokens + delay)


def earlier_speeds(machine: Machine, runs: Path, *, device: str) -> list[float]:
    """Returns the operations per second of finished trainings on this machine, one figure per run."""
    speeds = []
    for file in sorted(runs.glob("*/train/manifest.json")):
        run = file.parents[1]
        try:
            trained = json.loads(file.read_text(encoding="utf-8"))
            planned = json.loads((run / "plan" / "manifest.json").read_text(encoding="utf-8"))["product"]
            environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError):
            continue  # a run of another version, or one that is being written
        speed = trained.get("product", {}).get("tokens_per_second")
        effort = planned.get("token_operations")
        if speed and effort and _same_machine(environment, machine, device=device):
            speeds.append(speed * effort / max(1, planned.get("devices", 1)))
    return speeds


def _same_machine(environment: dict[str, Any], machine: Machine, *, device: str) -> bool:
    machine_then = environment.get("machine", {})
    gpus = [gpu.get("name") for gpu in machine_then.get("gpus", [])]
    device_then = environment.get("placement", {}).get("device")
    return (
        device_then == device
        and machine_then.get("cores") == machine.cores
        and gpus == [gpu.name for gpu in machine.gpus]
    )
