"""Decides how a step is computed: a pure function of wishes and facts, with reasons."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.errors import HardwareError
from finetune.kernels.config import KernelsConfig

CACHE_SHARE = 0.25
"""Share of the free memory that dequantized weights may take; activations need the rest."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the choice hangs on.

    Attributes:
        fusion_obstacle: Why the layers of this model cannot be fused; None where they can.
        quantized: Whether the fused layers' weights are quantized.
        dense_bytes: Size of those weights in 16 bit.
        free_bytes: Free memory of the device.
        head_split_obstacle: Why head and loss cannot be separated from the model; None where they can.
        native_obstacle: Why there are no native kernels; None where there are.
        tiles: Whether the attention kernels for AMX can be used.
        allocator_obstacle: Why freed memory cannot be kept; None where it can.
    """

    fusion_obstacle: str | None
    quantized: bool
    dense_bytes: int
    free_bytes: int
    head_split_obstacle: str | None
    native_obstacle: str | None
    tiles: bool
    allocator_obstacle: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a step is computed, and why, a sentence for each."""

    fused: bool
    cached: bool
    loss_on_trained_tokens: bool
    native: bool
    tiles: bool
    keep_memory: bool
    reasons: tuple[str, ...]


def choose(config: KernelsConfig, facts: Facts, *, device: str) -> Choice:
    """
    Raises:
        HardwareError: A wish other than ``auto`` that cannot be fulfilled here.
    """
    fused, fused_why = _wish(
        "layers",
        config.layers,
        "fused",
        facts.fusion_obstacle,
        "q, k, v and gate, up of this model read the same input",
    )
    crowded = facts.dense_bytes > CACHE_SHARE * facts.free_bytes
    no_cache = None if fused else "layers are plain"
    if config.weights == "auto" and fused and facts.quantized and device != "cpu":
        no_cache = f"memory on {device} is what 4-bit weights are for"
    elif config.weights == "auto" and fused and facts.quantized and crowded:
        no_cache = f"16-bit copies would take more than {CACHE_SHARE:.0%} of the free memory"
    gain = (
        "16-bit copies fit, and dequantizing is done once"
        if facts.quantized
        else "siblings lie below each other, nothing is held twice"
    )
    cached, cached_why = _wish("weights", config.weights, "cached", no_cache, gain)
    loss_on_trained_tokens, loss_why = _wish(
        "loss", config.loss, "trained", facts.head_split_obstacle, "the rest of the logits would be thrown away"
    )
    nothing_to_do = None if fused or loss_on_trained_tokens else "layers and loss are plain"
    native, native_why = _wish(
        "implementation",
        config.implementation,
        "native",
        facts.native_obstacle or nothing_to_do,
        "one pass over memory each",
    )
    keeps, memory_why = _wish(
        "memory",
        config.memory,
        "kept",
        facts.allocator_obstacle if device == "cpu" else f"{device} has torch's own allocator",
        "no page is asked for twice",
    )
    tiles = native and fused and facts.tiles
    reasons = (
        f"layers {'fused' if fused else 'plain'}: {fused_why}",
        f"weights {'cached' if cached else 'quantized' if facts.quantized else 'as loaded'}: {cached_why}",
        f"loss on {'trained' if loss_on_trained_tokens else 'all'} tokens: {loss_why}",
        f"kernels {'native' if native else 'plain'}: {native_why}{', attention in AMX tiles' if tiles else ''}",
        f"memory {'kept' if keeps else 'plain'}: {memory_why}",
    )
    return Choice(
        fused=fused, cached=cached, loss_on_trained_tokens=loss_on_trained_tokens, native=native, tiles=tiles, keep_memory=keeps, reasons=reasons
    )  # fmt: skip


def _wish(key: str, wish: str, better: str, obstacle: str | None, gain: str) -> tuple[bool, str]:
    """Whether the better form is taken, and why."""
    if wish not in ("auto", better):
        return False, f"as set by kernels.{key}"
    if obstacle is None:
        return True, gain if wish == "auto" else f"as set by kernels.{key}"
    if wish == "auto":
        return False, obstacle
    raise HardwareError(f"kernels.{key}={wish} is not possible here: {obstacle}; use kernels.{key}=auto")
