"""Decides where and in which dtype a run computes: a pure function of machine and config, with reasons."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import HardwareError
from finetune.hardware.backends import BACKENDS, methods_for
from finetune.hardware.gpus import Gpu, binding
from finetune.hardware.probe import Machine
from finetune.optim import UNPAGED

if TYPE_CHECKING:
    from finetune.config import RunConfig

X86 = ("x86_64", "AMD64", "i386", "i686")
BFLOAT16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16"})
"""x86 instruction sets that multiply bfloat16. Without them torch does so without vector instructions.
On an AMD EPYC with AVX2 only and two threads, a product of 2048 x 576 and 576 x 3072 took 9 times as long as in
float32, and a training step of the 135M model took 97 s."""

FLASH_CAPABILITIES = {"flash_attention_2": "8.0", "flash_attention_3": "9.0"}
"""The GPUs that each kernel supports. Source: README of Dao-AILab/flash-attention: 2 from Ampere on, 3 on Hopper."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how a run computes.

    Attributes:
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: Of the forward and backward pass: ``bfloat16``, ``float16`` or ``float32``.
        attention: transformers' ``attn_implementation``.
        optimizer: The optimizer that is used, by its transformers name.
        optimizer_reason: Why this optimizer was chosen.
        threads: CPU threads of this process.
        reasons: One sentence for each choice, as printed and recorded.
    """

    device: str
    dtype: str
    attention: str
    optimizer: str
    optimizer_reason: str
    threads: int
    reasons: tuple[str, ...]

    def key(self) -> dict[str, Any]:
        """Returns what changes a run's results; threads and reasons do not."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "attention": self.attention,
            "optimizer": self.optimizer,
        }


def place(machine: Machine, config: RunConfig) -> Placement:
    """Chooses device, dtype, attention, optimizer and threads.

    Raises:
        HardwareError: The machine cannot do what the config asks for; the message names the alternative.
    """
    device, device_reason = _choose_device(machine, config)
    gpus = used_gpus(machine, config) if device == "cuda" else ()
    dtype, dtype_reason = choose_dtype(machine, device, config.model.dtype, gpus=gpus)
    attention, attention_reason = _choose_attention(gpus, device, config.model.attention)
    optimizer, optimizer_reason = _choose_optimizer(device, config.optim.name)
    threads = config.hardware.threads or machine.cores
    threads_reason = "as set by hardware.threads" if config.hardware.threads else "the cores that this process may use"
    return Placement(
        device=device,
        dtype=dtype,
        attention=attention,
        optimizer=optimizer,
        optimizer_reason=optimizer_reason,
        threads=threads,
        reasons=(
            f"device {device}: {device_reason}",
            f"dtype {dtype}: {dtype_reason}",
            f"attention {attention}: {attention_reason}",
            f"optimizer {optimizer}: {optimizer_reason}",
            f"threads {threads}: {threads_reason}",
        ),
    )


def set_threads(placement: Placement, *, processes: int = 1) -> None:
    """Divides the threads among the processes of a machine: oversubscription made two of them ten times slower."""
    import torch

    torch.set_num_threads(max(1, placement.threads // processes))


def used_gpus(machine: Machine, config: RunConfig) -> tuple[Gpu, ...]:
    """Returns the GPUs that the run's processes on this machine use, one each."""
    return machine.gpus[: config.launch.processes // config.launch.nodes]


def free_on_gpus(machine: Machine, config: RunConfig, placement: Placement) -> int:
    """Returns the least free memory of the GPUs that the run uses, in bytes; 0 where it is not known."""
    gpus = used_gpus(machine, config) if placement.device == "cuda" else ()
    return min((gpu.free_bytes for gpu in gpus), default=0)


def bind_to_gpu(machine: Machine, placement: Placement, *, local: int) -> None:
    """Makes this process see one GPU, as ``cuda:0``; before torch starts CUDA, which reads the variables once.

    TRL refuses a process that sees several, and libraries put a context of half a gigabyte on the first one they see.

    Args:
        machine: The machine.
        placement: Where the run computes.
        local: Index of this process on its machine.

    Raises:
        HardwareError: This machine has fewer GPUs than processes.
    """
    if placement.device != "cuda":
        return
    if local >= len(machine.gpus):
        raise HardwareError(
            f"process {local + 1} of this machine has no GPU: {len(machine.gpus)} can be used "
            f"({', '.join(gpu.name for gpu in machine.gpus)}); use as many processes as GPUs (launch.processes)"
        )
    os.environ.update(binding(machine.gpus, local))


def choose_dtype(
    machine: Machine, device: str, requested: str, *, gpus: Sequence[Gpu] | None = None
) -> tuple[str, str]:
    """Returns the dtype to compute in and the reason; the plan uses the same choice.

    Args:
        machine: The machine.
        device: Where the run computes.
        requested: ``model.dtype``.
        gpus: Those that are used; None stands for all of the machine.

    Raises:
        HardwareError: bfloat16 is requested on a GPU that has none.
    """
    used = machine.gpus if gpus is None else gpus
    without_bfloat16 = [gpu for gpu in used if not gpu.has_bfloat16] if device == "cuda" else []
    if requested == "bfloat16" and without_bfloat16:
        gpu = without_bfloat16[0]
        raise HardwareError(
            f"model.dtype=bfloat16 needs compute capability 8.0; {gpu.name} has {gpu.capability}; "
            "use model.dtype=float16"
        )
    if requested != "auto":
        return requested, "as set by model.dtype"
    if without_bfloat16:
        return "float16", "this GPU has no bfloat16; the loss is scaled to keep gradients in range"
    if device == "cpu" and machine.processor in X86 and not BFLOAT16_INSTRUCTIONS & set(machine.features):
        return "float32", (
            "this CPU has neither avx512_bf16 nor amx_bf16, and torch multiplies bfloat16 there without vector "
            "instructions, many times slower than float32"
        )
    return "bfloat16", "half the memory of float32, with its range"


def _choose_device(machine: Machine, config: RunConfig) -> tuple[str, str]:
    device, method = config.hardware.device, config.quantization.method
    reason = "as set by hardware.device"
    if device == "auto":
        if machine.gpus:
            device, reason = "cuda", f"{len(machine.gpus)} x {machine.gpus[0].name}"
        elif machine.metal and "mps" in BACKENDS[method].devices:
            device, reason = "mps", "Apple GPU"
        else:
            device, reason = "cpu", machine.gpu_obstacle or "no GPU that this run can use"
    if device == "cuda" and not machine.gpus:
        raise HardwareError(
            f"hardware.device=cuda, but {machine.gpu_obstacle or 'no NVIDIA GPU is visible (NVML lists none)'}; "
            "use hardware.device=cpu or auto"
        )
    if device == "mps" and not machine.metal:
        raise HardwareError("hardware.device=mps, but this is not an Apple GPU; use hardware.device=cpu or auto")
    if device not in BACKENDS[method].devices:
        raise HardwareError(
            f"quantization.method={method} does not run on {device}; "
            f"choose one of {', '.join(methods_for(device))}, or hardware.device=cpu"
        )
    return device, reason


def _choose_attention(gpus: Sequence[Gpu], device: str, requested: str) -> tuple[str, str]:
    if requested == "auto":
        return "sdpa", "torch's own; it runs on every device and keeps packed documents separate"
    if requested.startswith("flash") and device != "cuda":
        raise HardwareError(
            f"model.attention={requested} needs a CUDA GPU and this run is on {device}; use model.attention=sdpa"
        )
    needed = FLASH_CAPABILITIES.get(requested)
    for gpu in gpus:
        if needed is not None and not gpu.has_capability(needed):
            raise HardwareError(
                f"model.attention={requested} needs compute capability {needed}; {gpu.name} has {gpu.capability}; "
                "use model.attention=sdpa"
            )
    return requested, "as set by model.attention"


def _choose_optimizer(device: str, requested: str) -> tuple[str, str]:
    if device == "cuda" or requested not in UNPAGED:
        return requested, "as set by optim.name"
    return UNPAGED[requested], (
        f"{requested} needs unified memory to page to, which {device} does not have; "
        "this is the same optimizer without paging"
    )
