"""The quantization group."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

METHODS = ("none", "nf4", "fp4", "int8")


@dataclass(kw_only=True, slots=True)
class QuantizationConfig:
    """How the frozen base is stored."""

    method: str
    """``none``, ``nf4``, ``fp4`` (bitsandbytes 4-bit) or ``int8`` (LLM.int8)."""

    double: bool
    """Quantizes the 4-bit blocks' constants too: 0.37 bit a parameter less. Source: QLoRA paper, section 3."""

    skip: list[str]
    """Last name segments of linear layers kept in full precision besides the head, e.g. ``down_proj``."""

    threshold: float
    """int8 only: activations beyond it are outliers, computed in 16 bit. Source: LLM.int8 paper, 6.0."""

    def problems(self) -> Iterator[str]:
        if self.method not in METHODS:
            yield f"quantization.method must be one of {', '.join(METHODS)}; got {self.method!r}"
        if self.double and self.method not in ("nf4", "fp4"):
            yield f"quantization.double is for nf4 and fp4; got method {self.method!r}: set quantization.double=false"
        if self.threshold < 0:
            yield f"quantization.threshold must not be negative; got {self.threshold}"


def spec(config: QuantizationConfig) -> dict[str, Any]:
    """What a loader must know to rebuild this base; travels with the adapter."""
    if config.method == "none":
        return {"method": "none"}
    if config.method == "int8":
        return {"method": "int8", "threshold": config.threshold, "skip": list(config.skip)}
    return {"method": config.method, "double": config.double, "blocksize": 64, "skip": list(config.skip)}
