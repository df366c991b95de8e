"""Decides how a step is computed: a pure function of settings and facts, with reasons."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.errors import HardwareError
from finetune.kernels.config import KernelsConfig

CACHE_SHARE = 0.25
"""Share of the free memory that dequantized weights may take; activations need the rest."""


@dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """What the choice depends on. An obstacle is a reason, or None where nothing stands in the way.

    Attributes:
        fusion_obstacle: Why the layers of this model cannot be fused.
        quantized: Whether the fused layers' weights are quantized.
        dense_bytes: Size of those weights in the dtype of the computation.
        free_bytes: Free memory of the device.
        head_split_obstacle: Why head and loss cannot be computed apart from the model.
        native_obstacle: Why there are no native kernels.
        compiled_obstacle: Why torch cannot compile its own.
        tiles: Whether the AMX attention kernels can be used.
        allocator_obstacle: Why freed memory cannot be kept.
        documents_obstacle: Why attention cannot be computed document by document in transformers' own layers.
        varlen_obstacle: Why torch's varlen attention cannot compute all documents in one call.
    """

    fusion_obstacle: str | None
    quantized: bool
    dense_bytes: int
    free_bytes: int
    head_split_obstacle: str | None
    native_obstacle: str | None
    tiles: bool
    compiled_obstacle: str | None = None
    allocator_obstacle: str | None = None
    documents_obstacle: str | None = None
    varlen_obstacle: str | None = "torch's varlen attention is for CUDA"


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """How a step is computed, with one sentence of reason for each setting."""

    fused: bool
    cached: bool
    loss_on_trained_tokens: bool
    implementation: str
    tiles: bool
    tune_malloc: bool
    documents: bool
    varlen: bool
    reasons: tuple[str, ...]

    @property
    def native(self) -> bool:
        """Returns whether the kernels are those in C++."""
        return self.implementation == "native"

    def rounding(self) -> dict[str, bool | str]:
        """Returns the choices that round differently from their alternatives: a run that continues keeps them."""
        return {
            "fused": self.fused,
            "loss_on_trained_tokens": self.loss_on_trained_tokens,
            "implementation": self.implementation,
            "tiles": self.tiles,
            "documents": self.documents,
            "varlen": self.varlen,
        }


def choose(config: KernelsConfig, facts: KernelFacts, *, device: str) -> KernelChoice:
    """Chooses the faster way for every setting that is ``auto``, and checks the others.

    Raises:
        HardwareError: A setting other than ``auto`` is not possible here.
    """
    fused, layers_reason = _decide(
        config, "layers", "fused", facts.fusion_obstacle, "one product for q, k, v and one for gate, up"
    )
    obstacle = _cache_obstacle(config, facts, fused, device)
    cached, weights_reason = _decide(config, "weights", "cached", obstacle, _cache_gain(facts))
    obstacle = facts.head_split_obstacle
    split, loss_reason = _decide(config, "loss", "trained", obstacle, "logits of other tokens are not needed")
    faster, obstacle = _implementation(config, facts, device)
    obstacle = obstacle or (None if fused or split else "layers and loss are plain")
    is_faster, kernels_reason = _decide(config, "implementation", faster, obstacle, "one pass over memory each")
    implementation = faster if is_faster else "plain"
    obstacle = facts.allocator_obstacle if device == "cpu" else f"torch has its own allocator on {device}"
    tune_malloc, memory_reason = _decide(config, "memory", "kept", obstacle, "the system is asked for memory only once")
    obstacle = facts.documents_obstacle or (None if split else "the loss is computed by transformers or TRL")
    documents, attention_reason = _decide(config, "attention", "documents", obstacle, "no mask of tokens by tokens")
    varlen = (documents or fused) and facts.varlen_obstacle is None
    tiles = implementation == "native" and fused and facts.tiles
    plain_weights = "quantized" if facts.quantized else "as loaded"
    amx = ", attention in AMX tiles" if tiles else ""
    reasons = (
        f"layers {'fused' if fused else 'plain'}: {layers_reason}",
        f"weights {'cached' if cached else plain_weights}: {weights_reason}",
        f"loss on {'trained' if split else 'all'} tokens: {loss_reason}",
        f"implementation {implementation}: {kernels_reason}{amx}",
        f"attention {'by document' if documents else 'masked'}: {attention_reason}"
        f"{', all documents in one varlen call' if varlen else ''}",
        f"memory {'kept' if tune_malloc else 'plain'}: {memory_reason}",
    )
    return KernelChoice(
        fused=fused,
        cached=cached,
        loss_on_trained_tokens=split,
        implementation=implementation,
        tiles=tiles,
        tune_malloc=tune_malloc,
        documents=documents,
        varlen=varlen,
        reasons=reasons,
    )


def _cache_obstacle(config: KernelsConfig, facts: KernelFacts, fused: bool, device: str) -> str | None:
    if not fused:
        return "layers are plain"
    if config.weights == "auto" and facts.quantized:
        if device != "cpu":
            return f"4-bit weights save memory on {device}"
        if facts.dense_bytes > CACHE_SHARE * facts.free_bytes:
            return f"dense copies would take more than {CACHE_SHARE:.0%} of the free memory"
    return None


def _implementation(config: KernelsConfig, facts: KernelFacts, device: str) -> tuple[str, str | None]:
    """Returns the implementation to take where nothing stands in its way, and what does."""
    obstacles = {"native": facts.native_obstacle, "compiled": facts.compiled_obstacle}
    usual = "native" if device == "cpu" else "compiled"
    wanted = config.implementation if config.implementation in obstacles else usual
    return wanted, obstacles[wanted]


def _cache_gain(facts: KernelFacts) -> str:
    return "dense copies fit, and weights are dequantized once" if facts.quantized else "fused weights share one tensor"


def _decide(config: KernelsConfig, key: str, better: str, obstacle: str | None, gain: str) -> tuple[bool, str]:
    """Returns whether the better form is taken, and the reason."""
    setting = getattr(config, key)
    if setting not in ("auto", better):
        return False, f"as set by kernels.{key}"
    if obstacle is None:
        return True, gain if setting == "auto" else f"as set by kernels.{key}"
    if setting == "auto":
        return False, obstacle
    raise HardwareError(f"kernels.{key}={setting} is not possible here: {obstacle}; use kernels.{key}=auto")
