"""The quantization group."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune.hardware.backends import BACKENDS, unsupported_reason

METHODS = tuple(BACKENDS)
BITS = (1, 2, 3, 4, 5, 6, 8)
"""What hqq can pack. Source: hqq 0.2.8, core/quantize.py, Quantizer.SUPPORTED_BITS."""

GROUP_MULTIPLE = 8
"""Source: hqq 0.2.8, hqq_base_quant_config."""


@dataclass(kw_only=True, slots=True)
class QuantizationConfig:
    """How the frozen base is stored."""

    method: str
    """``none``, ``nf4``, ``fp4`` (bitsandbytes 4-bit), ``int8`` (LLM.int8), ``torchao_int8``, ``hqq``; the others of
    finetune/hardware/backends.py are refused with the reason."""

    double: bool = False
    """Quantizes the 4-bit blocks' constants too: 0.37 bit a parameter less. Source: QLoRA paper, section 3."""

    keep: list[str] = field(default_factory=list)
    """Linear layers kept in full precision besides the head: the last segment of their names (``down_proj``), or their full
    names, with ``*`` for anything (``model.layers.0.*``)."""

    keep_mib: float = 0.0
    """MiB that may be spent on keeping further layers in full precision: those where it saves most, by measurement on the run's
    own training rows. 0 keeps none."""

    keep_tokens: int = 2048
    """Training tokens that measure it."""

    threshold: float = 6.0
    """int8 only: activations beyond it are outliers, computed in 16 bit. Source: LLM.int8 paper, section 3.2."""

    bits: int = 4
    """hqq only: bits a weight, before the groups' constants."""

    group_size: int = 64
    """hqq only: weights that share a scale and a zero point, which take 32 bits together."""

    def problems(self) -> Iterator[str]:
        if self.method not in METHODS:
            yield f"quantization.method must be one of {', '.join(METHODS)}; got {self.method!r}"
        elif unsupported_reason(self.method):
            yield unsupported_reason(self.method)
        if self.double and self.method not in ("nf4", "fp4"):
            yield f"quantization.double is for nf4 and fp4; got method {self.method!r}: set quantization.double=false"
        if self.threshold < 0:
            yield f"quantization.threshold must not be negative; got {self.threshold}"
        if self.bits not in BITS:
            yield f"quantization.bits must be one of {', '.join(map(str, BITS))}; got {self.bits}"
        if self.group_size < GROUP_MULTIPLE or self.group_size % GROUP_MULTIPLE:
            yield f"quantization.group_size must be a multiple of {GROUP_MULTIPLE}; got {self.group_size}"
        if self.keep_mib < 0:
            yield f"quantization.keep_mib must not be negative; got {self.keep_mib}"
        if self.keep_tokens < 1:
            yield f"quantization.keep_tokens must be at least 1; got {self.keep_tokens}"
        if self.method == "none" and (self.keep or self.keep_mib):
            yield "quantization.keep and keep_mib keep layers from being quantized, and quantization=none quantizes none: leave them out"


def spec(config: QuantizationConfig) -> dict[str, Any]:
    """What a loader must know to rebuild this base; travels with the adapter."""
    if config.method == "none":
        return {"method": "none"}
    own: dict[str, Any] = {}
    if config.method == "int8":
        own = {"threshold": config.threshold}
    elif config.method == "hqq":
        own = {"bits": config.bits, "group_size": config.group_size}
    elif config.method in ("nf4", "fp4"):
        own = {"double": config.double, "blocksize": 64}
    return {"method": config.method, **own, "keep": list(config.keep)}
