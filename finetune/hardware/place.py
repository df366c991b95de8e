"""Decides where and in which numbers a run computes: a pure function of machine and config, with reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.errors import HardwareError
from finetune.hardware.backends import LIMITS, runnable
from finetune.hardware.probe import Machine
from finetune.optim import UNPAGED

if TYPE_CHECKING:
    from finetune.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how a run computes.

    Attributes:
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: Numbers of the forward and backward pass: ``bfloat16``, ``float16`` or ``float32``.
        attention: transformers' ``attn_implementation``.
        optimizer: The optimizer that is used, by its transformers name.
        optimizer_reason: Why it is that one.
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


def place(machine: Machine, config: RunConfig) -> Placement:
    """Chooses device, dtype, attention, optimizer and threads.

    Raises:
        HardwareError: A wish that this machine cannot fulfil; the message names the alternative.
    """
    device, device_why = _device(machine, config)
    dtype, dtype_why = _dtype(machine, device, config.model.dtype)
    attention, attention_why = _attention(device, config.model.attention)
    optimizer, optimizer_reason = _optimizer(device, config.optim.name)
    threads = config.hardware.threads or machine.cores
    reasons = (
        f"device {device}: {device_why}",
        f"dtype {dtype}: {dtype_why}",
        f"attention {attention}: {attention_why}",
        f"optimizer {optimizer}: {optimizer_reason}",
        f"threads {threads}: {'as set' if config.hardware.threads else 'the cores that this process may use'}",
    )
    return Placement(
        device=device, dtype=dtype, attention=attention, optimizer=optimizer, optimizer_reason=optimizer_reason, threads=threads, reasons=reasons
    )  # fmt: skip


def _device(machine: Machine, config: RunConfig) -> tuple[str, str]:
    wish, method = config.hardware.device, config.quantization.method
    if wish == "auto":
        if machine.gpus:
            wish, why = "cuda", f"{len(machine.gpus)} x {machine.gpus[0].name}"
        elif machine.metal and "mps" in LIMITS[method].devices:
            wish, why = "mps", "Apple GPU"
        else:
            wish, why = "cpu", "no GPU that this run can use"
    else:
        why = "as set by hardware.device"
    if wish == "cuda" and not machine.gpus:
        raise HardwareError(
            "hardware.device=cuda, but no NVIDIA GPU is visible (nvidia-smi lists none); use hardware.device=cpu or auto"
        )
    if wish == "mps" and not machine.metal:
        raise HardwareError("hardware.device=mps, but this is no Apple GPU; use hardware.device=cpu or auto")
    if wish not in LIMITS[method].devices:
        able = ", ".join(runnable(wish))
        raise HardwareError(
            f"quantization.method={method} does not run on {wish}; choose one of {able}, or hardware.device=cpu"
        )
    return wish, why


def _dtype(machine: Machine, device: str, wish: str) -> tuple[str, str]:
    bfloat16 = device != "cuda" or all(gpu.has_bfloat16 for gpu in machine.gpus)
    if wish == "bfloat16" and not bfloat16:
        old = next(gpu for gpu in machine.gpus if not gpu.has_bfloat16)
        raise HardwareError(
            f"model.dtype=bfloat16 needs compute capability 8.0; {old.name} has {old.capability}; use model.dtype=float16"
        )
    if wish != "auto":
        return wish, "as set by model.dtype"
    if not bfloat16:
        return "float16", "this GPU has no bfloat16; gradients are scaled to stay in range"
    if device == "cpu" and not {"avx512_bf16", "amx_bf16"} & set(machine.features):
        return "bfloat16", "half the memory of float32; this CPU emulates it, so it may be slow"
    return "bfloat16", "the device computes in it, with float32's range"


def _attention(device: str, wish: str) -> tuple[str, str]:
    if wish != "auto":
        if wish.startswith("flash") and device != "cuda":
            raise HardwareError(
                f"model.attention={wish} needs a CUDA GPU and this run is on {device}; use model.attention=sdpa"
            )
        return wish, "as set by model.attention"
    return "sdpa", "torch's own, on every device, and it keeps packed documents apart"


def _optimizer(device: str, wish: str) -> tuple[str, str]:
    if device == "cuda" or wish not in UNPAGED:
        return wish, "as set by optim.name"
    return UNPAGED[
        wish
    ], f"{wish} was asked for; {device} has no unified memory to page to, and this is the same optimizer without paging"
