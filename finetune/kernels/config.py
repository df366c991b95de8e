"""The speed group: how a training step is computed. Results stay within rounding whatever is chosen."""

from collections.abc import Iterator
from dataclasses import dataclass

CHOICES = {
    "layers": ("auto", "fused", "plain"),
    "weights": ("auto", "cached", "quantized"),
    "loss": ("auto", "trained", "all"),
    "implementation": ("auto", "native", "plain"),
    "memory": ("auto", "kept", "plain"),
}


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    """What may be computed in another way. ``auto`` takes the faster one wherever it can be had, and says why."""

    layers: str
    """``fused``: q, k, v and gate, up as one product each with their adapters, documents attended to one by one, only what the
    way back needs is kept; ``plain``: transformers' and peft's own."""

    weights: str
    """``cached``: 4-bit weights of fused layers are dequantized once and kept in 16 bit; ``quantized``: at each use, which a
    GPU's memory is spared for."""

    loss: str
    """``trained``: head and loss on trained tokens only, a few at a time; ``all``: TRL's own."""

    implementation: str
    """``native``: steps between products in C++, compiled for this processor on first use; ``plain``: torch."""

    memory: str
    """``kept``: what a step frees is kept for the next one instead of given back to the system; ``plain``: the C library's rules."""

    def problems(self) -> Iterator[str]:
        for key, values in CHOICES.items():
            if (value := getattr(self, key)) not in values:
                yield f"kernels.{key} must be one of {', '.join(values)}; got {value!r}"
        if self.layers == "plain":
            for key, value in (("weights", "cached"), ("implementation", "native")):
                if getattr(self, key) == value:
                    yield f"kernels.{key}={value} serves fused layers and kernels.layers is plain; set one of them to auto"
