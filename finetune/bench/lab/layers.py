"""Inside the layers: how far each kind of rounding moves them, where the outliers are, and what smoothing does about them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
BLOCKS = (64, 128, 256, 512, 1024)
OUTLIER = 6.0
"""An activation beyond it is an outlier. Source: Dettmers et al. 2022, LLM.int8(), section 3.2."""

MIGRATION = 0.5
"""Share of the difficulty that moves from activations to weights. Source: Xiao et al. 2023, SmoothQuant, section 4."""

ACTIVATION_ROWS = 4
HISTOGRAM_BINS = 60
MOST_UNEVEN = 12


@dataclass(frozen=True, kw_only=True)
class Study:
    """What was found.

    Attributes:
        errors: Per layer and method: ``{"layer", "method", "rms", "max", "cosine"}``; rms is a share of the weights' own.
        blocks: Per block size: ``{"block", "bits", "double_bits", "rms", "double_rms"}`` of NF4.
        codes: By method, the levels of its code book between -1 and 1.
        histogram: Shares of weights by their value over their block's largest, in equal bins between -1 and 1.
        code_errors: By code book, the mean squared error over the weights' mean square.
        activations: Per layer: ``{"layer", "largest", "median", "outlier_channels", "channels"}`` of its inputs, and
            ``weight_unevenness``: how many times its median input channel the largest one of its weight is.
        smoothing: Per layer with the most uneven inputs: ``{"layer", "before", "after"}``, relative error of the layer's
            output in int8 with one scale for activations, without and with SmoothQuant's migration.
    """

    errors: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    codes: dict[str, list[float]] = field(default_factory=dict)
    histogram: list[float] = field(default_factory=list)
    code_errors: dict[str, float] = field(default_factory=dict)
    activations: list[dict[str, Any]] = field(default_factory=list)
    smoothing: list[dict[str, Any]] = field(default_factory=list)


def study(folder: Path, rows: list[dict[str, list[int]]]) -> Study:
    """Studies a base in float32.

    Args:
        folder: Holds it.
        rows: ``input_ids``; the first few are read for activations.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    inputs = record_inputs(model, layers, rows[:ACTIVATION_ROWS])
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    blocks = normalized(weights)
    uneven = sorted(inputs, key=lambda name: -unevenness(inputs[name]))[:MOST_UNEVEN]
    return Study(
        errors=[
            {"layer": name, "method": method, **distance(weight, rounded(weight))}
            for name, weight in weights.items()
            for method, rounded in ROUNDINGS.items()
        ],
        blocks=[block_size(weights, block) for block in BLOCKS],
        codes={name: code.tolist() for name, code in code_books().items()},
        histogram=(torch.histc(blocks, HISTOGRAM_BINS, -1, 1) / blocks.numel()).tolist(),
        code_errors={name: code_error(blocks, code) for name, code in code_books().items()},
        activations=[
            {"layer": name, **spread(seen), "weight_unevenness": unevenness(weights[name])}
            for name, seen in inputs.items()
        ],
        smoothing=[{"layer": name, **smoothed(inputs[name], weights[name])} for name in uneven],
    )


def record_inputs(model: Any, layers: dict[str, Any], rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """What each layer reads, shape (tokens, channels) in bfloat16; layers that read the same share it."""
    import torch

    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0].detach().flatten(0, -2).bfloat16())
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def four_bit(kind: str, *, block: int = BLOCK, double: bool = False) -> Callable[[Tensor], Tensor]:
    """bitsandbytes' own rounding, there and back."""

    def there_and_back(weight: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        # In rows of one block: on a CPU bitsandbytes 0.50.2 reads longer blocks than a row's end as noise.
        packed, state = quantize_4bit(
            weight.reshape(-1, block), blocksize=block, quant_type=kind, compress_statistics=double
        )
        result: Tensor = dequantize_4bit(packed, state).view_as(weight)
        return result

    return there_and_back


def uniform(bits: int, *, block: int | None) -> Callable[[Tensor], Tensor]:
    """Evenly spaced levels, symmetric, one scale a block or a row."""

    def there_and_back(weight: Tensor) -> Tensor:
        groups = weight.reshape(-1, block) if block else weight
        top = 2 ** (bits - 1) - 1
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
        return ((groups / scale).round().clamp(-top - 1, top) * scale).view_as(weight)

    return there_and_back


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "nf4": four_bit("nf4"),
    "nf4 double": four_bit("nf4", double=True),
    "fp4": four_bit("fp4"),
    "uniform 4 bit": uniform(4, block=BLOCK),
    "int8 a row": uniform(8, block=None),
}


def distance(weight: Tensor, other: Tensor) -> dict[str, float]:
    """Root mean square error over the weights' own, largest error, and cosine between both."""
    import torch

    error = weight - other
    cosine = torch.nn.functional.cosine_similarity(weight.flatten().double(), other.flatten().double(), dim=0)
    return {"rms": float(error.norm() / weight.norm()), "max": float(error.abs().max()), "cosine": float(cosine)}


def block_size(weights: dict[str, Tensor], block: int) -> dict[str, Any]:
    """NF4 at one block size: bits a weight by counting (4, and a float32 a block; with double quantization a byte a block and
    a float32 for every 256 of them), and the error that comes with them."""
    plain, double = (
        math.sqrt(mean_square(weights, four_bit("nf4", block=block, double=double))) for double in (False, True)
    )
    return {
        "block": block,
        "bits": 4 + 32 / block,
        "double_bits": 4 + 8 / block + 32 / (block * 256),
        "rms": plain,
        "double_rms": double,
    }


def mean_square(weights: dict[str, Tensor], rounded: Callable[[Tensor], Tensor]) -> float:
    """Squared error of all weights over their sum of squares."""
    lost = sum(float((weight - rounded(weight)).square().sum()) for weight in weights.values())
    return lost / sum(float(weight.square().sum()) for weight in weights.values())


def normalized(weights: dict[str, Tensor]) -> Tensor:
    """Every weight over the largest of its block, shape (weights,)."""
    import torch

    groups = [weight.reshape(-1, BLOCK) for weight in weights.values()]
    return torch.cat([(group / group.abs().amax(-1, keepdim=True).clamp_min(1e-12)).flatten() for group in groups])


def code_books() -> dict[str, Tensor]:
    """Levels between -1 and 1, ascending."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    made = {name: get_4bit_type(name, device="cpu").float().unique() for name in ("nf4", "fp4")}
    return {**made, "uniform": torch.linspace(-1, 1, 15)}


def code_error(values: Tensor, code: Tensor) -> float:
    """Squared error over mean square when each value goes to its nearest level."""
    import torch

    places = torch.bucketize(values, (code[1:] + code[:-1]) / 2)
    return float((values - code[places]).square().mean() / values.square().mean())


def spread(seen: Tensor) -> dict[str, Any]:
    """How uneven a layer's inputs are, channel by channel."""
    tops = seen.float().abs().amax(0)
    outliers = int((tops > OUTLIER).sum())
    return {
        "largest": float(tops.max()),
        "median": float(tops.median()),
        "outlier_channels": outliers,
        "channels": len(tops),
    }


def unevenness(seen: Tensor) -> float:
    tops = seen.float().abs().amax(0)
    return float(tops.max() / tops.median().clamp_min(1e-12))


def smoothed(seen: Tensor, weight: Tensor) -> dict[str, float]:
    """Error of the layer's output in int8, without and with the migration of scales from inputs to weights."""
    x = seen.float()
    scale = (x.abs().amax(0).clamp_min(1e-5) ** MIGRATION) / (weight.abs().amax(0).clamp_min(1e-5) ** (1 - MIGRATION))
    return {"before": int8_error(x, weight, x, weight), "after": int8_error(x, weight, x / scale, weight * scale)}


def int8_error(x: Tensor, weight: Tensor, scaled: Tensor, rescaled: Tensor) -> float:
    """Relative error of the product when inputs get one scale for the tensor and weights one a row."""
    tensor_scale = scaled.abs().max() / 127
    inputs = (scaled / tensor_scale).round().clamp(-128, 127) * tensor_scale
    exact = x @ weight.T
    return float((inputs @ uniform(8, block=None)(rescaled).T - exact).norm() / exact.norm())
