"""Rounds weights to many formats and back: what granularity, symmetry, code books and block formats are worth.

Bits count everything that is stored: codes, scales and zero points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-12
MX_BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float. Source: OCP Microscaling Formats (MX) v1.0, section 5.3.3."""

E2M1_EXPONENT = 2
"""Of its largest value. Source: the same, section 6.3."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """A way to store a matrix.

    Attributes:
        name: For tables.
        shows: What a reader sees by comparing it with the one before.
        bits: Per weight of a matrix with the given shape.
        there_and_back: Rounds and decodes.
    """

    name: str
    shows: str
    bits: Callable[[tuple[int, int]], float]
    there_and_back: Callable[[Tensor], Tensor]


def symmetric(bits: int, *, group: int | None) -> Callable[[Tensor], Tensor]:
    """Returns rounding to evenly spaced levels around zero.

    Args:
        bits: Of a code.
        group: Weights of a row that share a scale; 0 for a row, None for the whole matrix.
    """

    def there_and_back(weight: Tensor) -> Tensor:
        groups = _groups(weight, group)
        top = 2 ** (bits - 1) - 1
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(TINY) / top
        return ((groups / scale).round().clamp(-top - 1, top) * scale).view_as(weight)

    return there_and_back


def asymmetric(bits: int, *, group: int | None) -> Callable[[Tensor], Tensor]:
    """Returns rounding to evenly spaced levels between a group's smallest and largest weight; see `symmetric`."""

    def there_and_back(weight: Tensor) -> Tensor:
        groups = _groups(weight, group)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        top = 2**bits - 1
        scale = (high - low).clamp_min(TINY) / top
        zero = (-low / scale).round()
        return (((groups / scale).round() + zero).clamp(0, top).sub(zero) * scale).view_as(weight)

    return there_and_back


def four_bit_floats(kind: str, *, double: bool = False) -> Callable[[Tensor], Tensor]:
    """Returns bitsandbytes' NF4 or FP4 in blocks of 64."""
    from benchmarks.quantization_layers import four_bit

    return four_bit(kind, double=double)


def fp8(weight: Tensor) -> Tensor:
    """Rounds to E4M3 with a scale per row, as `export=[fp8]` does."""
    from finetune.export.fp8 import quantize

    codes, scales = quantize(weight)
    return codes.float() * scales


def mxfp4(weight: Tensor) -> Tensor:
    """Rounds to 4-bit floats with a power of two for each 32 weights.

    Source: OCP Microscaling Formats (MX) v1.0, section 6.3.
    """
    import torch

    groups = weight.reshape(-1, MX_BLOCK)
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(TINY)
    scale = torch.exp2(torch.floor(torch.log2(largest)) - E2M1_EXPONENT)
    levels = torch.tensor(E2M1)
    magnitude = (groups / scale).abs().clamp(max=E2M1[-1])
    nearest = levels[torch.bucketize(magnitude, (levels[1:] + levels[:-1]) / 2)]
    return (nearest * groups.sign() * scale).view_as(weight)


def ggml(name: str) -> Callable[[Tensor], Tensor]:
    """Returns llama.cpp's rounding to a GGUF type, in rows of 256 weights."""

    def there_and_back(weight: Tensor) -> Tensor:
        import torch
        from gguf import GGMLQuantizationType, dequantize

        from finetune.export.gguf.library import quantize
        from finetune.export.gguf.quant_types import row_bytes

        quant_type = GGMLQuantizationType[name]
        rows = weight.reshape(-1, 256).numpy()
        blocks = quantize(rows, quant_type, row_bytes=row_bytes(quant_type, 256))
        return torch.from_numpy(dequantize(blocks, quant_type)).view_as(weight)

    return there_and_back


def _groups(weight: Tensor, group: int | None) -> Tensor:
    if group is None:
        return weight.reshape(1, -1)
    return weight.reshape(-1, group) if group else weight


def _uniform_bits(bits: int, *, group: int | None, zero: int = 0) -> Callable[[tuple[int, int]], float]:
    """Counts a 16-bit scale, and a zero point of ``zero`` bits, for each group."""

    def count(shape: tuple[int, int]) -> float:
        size = math.prod(shape) if group is None else group or shape[1]
        return bits + (16 + zero) / size

    return count


def _block_bits(name: str) -> Callable[[tuple[int, int]], float]:
    def count(_: tuple[int, int]) -> float:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        return 8 * size / weights

    return count


def formats() -> list[WeightFormat]:
    """Returns the formats, each next to the one that it is compared with."""

    def entry(
        name: str, shows: str, bits: Callable[[tuple[int, int]], float], rounding: Callable[[Tensor], Tensor]
    ) -> WeightFormat:
        return WeightFormat(name=name, shows=shows, bits=bits, there_and_back=rounding)

    return [
        entry("int8, one scale", "per tensor", _uniform_bits(8, group=None), symmetric(8, group=None)),
        entry("int8, a scale per row", "per channel", _uniform_bits(8, group=0), symmetric(8, group=0)),
        entry("FP8 E4M3, a scale per row", "floats", _uniform_bits(8, group=0), fp8),
        entry("int4, one scale", "per tensor", _uniform_bits(4, group=None), symmetric(4, group=None)),
        entry("int4, a scale per row", "per channel", _uniform_bits(4, group=0), symmetric(4, group=0)),
        entry("int4, groups of 64", "per group", _uniform_bits(4, group=64), symmetric(4, group=64)),
        entry(
            "int4, groups of 64, asymmetric",
            "a zero point",
            _uniform_bits(4, group=64, zero=4),
            asymmetric(4, group=64),
        ),
        entry("int4, groups of 32", "smaller groups", _uniform_bits(4, group=32), symmetric(4, group=32)),
        entry("FP4, blocks of 64", "a code book", lambda _: 4 + 32 / 64, four_bit_floats("fp4")),
        entry("NF4, blocks of 64", "quantiles", lambda _: 4 + 32 / 64, four_bit_floats("nf4")),
        entry(
            "NF4, double quantization",
            "constants in 8 bits",
            lambda _: 4 + 8 / 64 + 32 / (64 * 256),
            four_bit_floats("nf4", double=True),
        ),
        entry("MXFP4", "a power of two for 32", lambda _: 4 + 8 / MX_BLOCK, mxfp4),
        *[entry(name, "GGUF", _block_bits(name), ggml(name)) for name in ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")],
    ]


def measure(weights: dict[str, Tensor]) -> list[dict[str, float | str]]:
    """Returns for each format ``{"format", "shows", "bits", "rms"}`` over all matrices, by their numbers of weights."""
    total = sum(weight.numel() for weight in weights.values())
    size = sum(float(weight.square().sum()) for weight in weights.values())
    rows: list[dict[str, float | str]] = []
    for form in formats():
        lost = sum(float((weight - form.there_and_back(weight)).square().sum()) for weight in weights.values())
        bits = sum(form.bits((weight.shape[0], weight.shape[1])) * weight.numel() for weight in weights.values())
        rows.append({"format": form.name, "shows": form.shows, "bits": bits / total, "rms": math.sqrt(lost / size)})
    return rows
