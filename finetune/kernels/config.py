"""The kernels group: how a training step is computed. Results stay within rounding whatever is chosen."""

from collections.abc import Iterator
from dataclasses import dataclass

CHOICES = {
    "layers": ("auto", "fused", "plain"),
    "weights": ("auto", "cached", "quantized"),
    "loss": ("auto", "trained", "all"),
    "implementation": ("auto", "native", "compiled", "plain"),
    "attention": ("auto", "documents", "masked"),
    "memory": ("auto", "kept", "plain"),
}


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    """Selects how steps are computed. ``auto`` takes the faster way wherever it is possible, and logs the reason."""

    layers: str
    """``fused``: one product for q, k, v and one for gate, up, adapters included; attention per packed document; saves
    only what backward needs. ``plain``: the layers of transformers and peft."""

    weights: str
    """``cached``: dequantizes the 4-bit weights of fused layers once and keeps them dense. ``quantized``:
    dequantizes at each use, which saves memory on a GPU."""

    loss: str
    """``trained``: computes head and loss on trained tokens only, in chunks. ``all``: TRL's loss over all logits."""

    implementation: str
    """``native``: norm, activation, loss and attention in C++, compiled for this CPU on first use. ``compiled``: norm,
    activation and loss in torch, compiled by torch for the device, which takes seconds to minutes once. ``plain``:
    torch. ``auto`` takes ``native`` on CPUs and ``compiled`` on GPUs."""

    attention: str = "auto"
    """``documents``: packed documents one by one, or in one call of torch's varlen attention on GPUs from Ampere on.
    ``masked``: a mask of tokens by tokens in layers that are not fused."""

    memory: str
    """``kept``: the process keeps freed memory for the next step. ``plain``: the C library's defaults."""

    def problems(self) -> Iterator[str]:
        for key, values in CHOICES.items():
            if (value := getattr(self, key)) not in values:
                yield f"kernels.{key} must be one of {', '.join(values)}; got {value!r}"
        if self.layers == "plain":
            for key, value in (("weights", "cached"), ("implementation", "native")):
                if getattr(self, key) == value:
                    yield f"kernels.{key}={value} needs fused layers and kernels.layers is plain; set one to auto"
