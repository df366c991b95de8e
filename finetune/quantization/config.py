"""The quantization group, and the form in which every library describes a quantized layer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.hardware.backends import BACKENDS, CALIBRATED, unsupported_reason

if TYPE_CHECKING:
    from torch import Size, Tensor

METHODS = tuple(BACKENDS)
PREQUANTIZED = "prequantized"
"""The method of a base that its own checkpoint stores quantized."""

QAT = "qat"
"""The method that keeps the base dense and trains on the rounding of its sum with the adapter."""

DOUBLE = ("nf4", "fp4", QAT)
"""Methods whose blocks have constants that can be quantized too."""

BITS = (1, 2, 3, 4, 5, 6, 8)
"""What hqq can pack. Source: hqq 0.2.8, core/quantize.py, Quantizer.SUPPORTED_BITS."""

GROUP_MULTIPLE = 8
"""Source: hqq 0.2.8, hqq_base_quant_config."""

GROUPS = (32, 64, 128)
"""Group sizes that servers have kernels for. Source: vLLM, marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES."""


@dataclass(kw_only=True, slots=True)
class QuantizationConfig:
    """Selects how the frozen base is stored."""

    method: str
    """``none``, ``nf4``, ``fp4`` (bitsandbytes 4-bit), ``int8`` (LLM.int8), ``torchao_int8``, ``hqq``;
    ``gptq`` and ``awq`` (4 bits, calibrated on the training rows by auto-round), ``prequantized`` for a base that is
    stored quantized (GPTQ, AWQ, ...); ``qat`` keeps the base dense and trains on the NF4 rounding of its sum with the
    adapter. The other methods of finetune/hardware/backends.py are refused with the reason."""

    double: bool = False
    """Quantizes the constants of the 4-bit blocks too: saves 0.37 bit per parameter. Source: QLoRA paper, section 3."""

    skip_modules: list[str] = field(default_factory=list)
    """Linear layers in full precision besides the head: the last segment of their names (``down_proj``), or their full
    names, with ``*`` for anything (``model.layers.0.*``)."""

    skip_modules_mib: float = 0.0
    """MiB to spend on further layers in full precision. They are chosen by measuring on the run's own training rows
    where full precision helps most. 0 chooses none."""

    skip_modules_tokens: int = 2048
    """Training tokens for that measurement."""

    threshold: float = 6.0
    """int8 only: larger activations are outliers, computed in 16 bit. Source: LLM.int8 paper, section 3.2."""

    bits: int = 4
    """hqq only: bits per weight, before the groups' constants."""

    group_size: int = 64
    """hqq, gptq and awq: inputs that share a scale and a zero point. The last two take 32, 64 or 128."""

    calibration_rows: int = 32
    """gptq and awq: sequences of training tokens to calibrate on, at most."""

    calibration_tokens: int = 256
    """gptq and awq: tokens of each of these sequences, which rows fill one after the other."""

    steps: int = 20
    """gptq only: steps of SignRound for each block. auto-round itself takes 200; 0 rounds to nearest."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        used_by = f"and quantization.method={self.method}"
        if self.method != "hqq":
            yield "bits", f"it is hqq's, {used_by}"
        if self.method not in ("hqq", *CALIBRATED):
            yield "group_size", f"it is of hqq, gptq and awq, {used_by}"
        if self.method not in CALIBRATED:
            yield from (
                (name, f"it is of gptq and awq, {used_by}") for name in ("calibration_rows", "calibration_tokens")
            )
        if self.method != "gptq":
            yield "steps", f"it is gptq's, {used_by}"
        if self.method in ("none", PREQUANTIZED, *CALIBRATED):
            yield "skip_modules", "no layer can be exempted"
        if not self.skip_modules_mib:
            yield "skip_modules_tokens", "quantization.skip_modules_mib=0 measures nothing"

    def problems(self) -> Iterator[str]:
        if self.method not in METHODS:
            yield f"quantization.method must be one of {', '.join(METHODS)}; got {self.method!r}"
        elif unsupported_reason(self.method):
            yield unsupported_reason(self.method)
        if self.double and self.method not in DOUBLE:
            yield (
                f"quantization.double is for {', '.join(DOUBLE)}; got method {self.method!r}: "
                "set quantization.double=false"
            )
        if self.threshold < 0:
            yield f"quantization.threshold must not be negative; got {self.threshold}"
        if self.bits not in BITS:
            yield f"quantization.bits must be one of {', '.join(map(str, BITS))}; got {self.bits}"
        if self.group_size < GROUP_MULTIPLE or self.group_size % GROUP_MULTIPLE:
            yield f"quantization.group_size must be a multiple of {GROUP_MULTIPLE}; got {self.group_size}"
        if self.skip_modules_mib < 0:
            yield f"quantization.skip_modules_mib must not be negative; got {self.skip_modules_mib}"
        if self.skip_modules_tokens < 1:
            yield f"quantization.skip_modules_tokens must be at least 1; got {self.skip_modules_tokens}"
        if self.method in ("none", PREQUANTIZED, *CALIBRATED) and (self.skip_modules or self.skip_modules_mib):
            why = "rounds all layers alike" if self.method in CALIBRATED else "quantizes nothing"
            yield (
                "quantization.skip_modules and skip_modules_mib exempt layers from quantization, and "
                f"quantization={self.method} {why}: leave them out"
            )
        if self.method == QAT and self.skip_modules_mib:
            yield (
                "quantization.skip_modules_mib measures the rounding of the base alone, and quantization=qat trains on "
                "that of the sum: name layers in quantization.skip_modules"
            )
        if self.method in CALIBRATED:
            yield from self._calibration_problems()

    def _calibration_problems(self) -> Iterator[str]:
        if self.group_size not in GROUPS:
            sizes = ", ".join(map(str, GROUPS))
            yield f"quantization.group_size of {self.method} must be one of {sizes}; got {self.group_size}"
        for name, smallest in (("calibration_rows", 1), ("calibration_tokens", 1), ("steps", 0)):
            if getattr(self, name) < smallest:
                yield f"quantization.{name} must be at least {smallest}; got {getattr(self, name)}"


def spec(config: QuantizationConfig) -> dict[str, Any]:
    """Returns what a loader must know to build this base again; it is saved with the adapter."""
    if config.method == "none":
        return {"method": "none"}
    settings: dict[str, Any] = {}
    if config.method == "int8":
        settings = {"threshold": config.threshold}
    elif config.method == "hqq":
        settings = {"bits": config.bits, "group_size": config.group_size}
    elif config.method in CALIBRATED:
        names = ("group_size", "calibration_rows", "calibration_tokens", "steps")
        settings = {name: getattr(config, name) for name in names}
    elif config.method in DOUBLE:
        settings = {"double": config.double, "blocksize": 64}
    return {"method": config.method, **settings, "keep": list(config.skip_modules)}


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """The weight of a quantized layer.

    Attributes:
        shape: Of the dense weight, (outputs, inputs).
        codes: The packed integers.
        constants: Scales and zero points, by name.
        books: What all layers share: the values that the codes stand for.
        layout: What else decides how the codes are read.
    """

    shape: "Size"
    codes: "Tensor"
    constants: "dict[str, Tensor]"
    books: "dict[str, Tensor]" = field(default_factory=dict)
    layout: str = ""
