"""Measures rounding errors and outliers inside layers: ``python -m benchmarks.quantization_layers TEXT``.

Writes one page. ``--results`` adds a comparison with published claims, from the JSON of `finetune bench quantization`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.activation_ranges import int8, output_errors
from benchmarks.weight_formats import measure as measure_formats
from benchmarks.weight_formats import symmetric

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
BLOCKS = (64, 128, 256, 512, 1024)
OUTLIER = 6.0
"""An activation beyond it is an outlier. Source: Dettmers et al. 2022, LLM.int8(), section 3.2."""

EVERY = 8
"""Formats and ranges are measured in every eighth layer: a block of most decoders has seven, so all kinds are there."""

ACTIVATION_ROWS = 4
HISTOGRAM_BINS = 60
MOST_UNEVEN = 12


@dataclass(frozen=True, kw_only=True)
class Study:
    """Measurements of one base.

    Attributes:
        errors: Per layer and method: ``{"layer", "method", "rms", "max", "cosine"}``; rms is a share of the weights'
            own.
        blocks: Per block size: ``{"block", "bits", "double_bits", "rms", "double_rms"}`` of NF4.
        codes: By method, the levels of its code book between -1 and 1.
        histogram: Shares of weights by their value over their block's largest, in equal bins between -1 and 1.
        code_errors: By code book, the mean squared error over the weights' mean square.
        activations: Per layer: ``{"layer", "largest", "median", "outlier_channels", "channels"}`` of its inputs, and
            ``weight_unevenness``: its weight's largest input channel over the median one.
        smoothing: Per layer with the most uneven inputs: ``{"layer", "before", "after"}``, relative error of the
            layer's output in int8 with one scale for activations, without and with SmoothQuant's migration.
        formats: Of `weight_formats.measure`, in every eighth layer.
        ranges: By how the range of the inputs ends, the relative error of the output of every eighth layer; see
            `activation_ranges.output_errors`.
    """

    errors: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    codes: dict[str, list[float]] = field(default_factory=dict)
    histogram: list[float] = field(default_factory=list)
    code_errors: dict[str, float] = field(default_factory=dict)
    activations: list[dict[str, Any]] = field(default_factory=list)
    smoothing: list[dict[str, Any]] = field(default_factory=list)
    formats: list[dict[str, Any]] = field(default_factory=list)
    ranges: dict[str, list[float]] = field(default_factory=dict)


def study_layers(folder: Path, rows: list[dict[str, list[int]]]) -> Study:
    """Measures a base in float32.

    Args:
        folder: The base.
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
    some = {name: weights[name] for name in list(weights)[::EVERY]}
    ends = [output_errors(inputs[name], weight) for name, weight in some.items()]
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
        formats=measure_formats(some),
        ranges={name: [errors[name] for errors in ends] for name in ends[0]},
    )


def record_inputs(model: Any, layers: dict[str, Any], rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Records what each layer reads, shape (tokens, channels), in bfloat16."""
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
    """Returns bitsandbytes' own rounding, there and back."""

    def there_and_back(weight: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        # In rows of one block: on a CPU bitsandbytes 0.50.2 reads longer blocks than a row's end as noise.
        packed, state = quantize_4bit(
            weight.reshape(-1, block), blocksize=block, quant_type=kind, compress_statistics=double
        )
        result: Tensor = dequantize_4bit(packed, state).view_as(weight)
        return result

    return there_and_back


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "nf4": four_bit("nf4"),
    "nf4 double": four_bit("nf4", double=True),
    "fp4": four_bit("fp4"),
    "uniform 4 bit": symmetric(4, group=BLOCK),
    "int8 a row": symmetric(8, group=0),
}


def distance(weight: Tensor, other: Tensor) -> dict[str, float]:
    """Returns root mean square error over the weights' own, largest error, and cosine between both."""
    import torch

    error = weight - other
    cosine = torch.nn.functional.cosine_similarity(weight.flatten().double(), other.flatten().double(), dim=0)
    return {"rms": float(error.norm() / weight.norm()), "max": float(error.abs().max()), "cosine": float(cosine)}


def block_size(weights: dict[str, Tensor], block: int) -> dict[str, Any]:
    """Measures NF4 at one block size: its error, and its bits per weight.

    Bits are counted as 4 and a float32 per block; with double quantization a byte per block and one float32 for 256.
    """
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
    """Returns the squared error of all weights over their sum of squares."""
    lost = sum(float((weight - rounded(weight)).square().sum()) for weight in weights.values())
    return lost / sum(float(weight.square().sum()) for weight in weights.values())


def normalized(weights: dict[str, Tensor]) -> Tensor:
    """Divides every weight by the largest of its block, shape (weights,)."""
    import torch

    groups = [weight.reshape(-1, BLOCK) for weight in weights.values()]
    return torch.cat([(group / group.abs().amax(-1, keepdim=True).clamp_min(1e-12)).flatten() for group in groups])


def code_books() -> dict[str, Tensor]:
    """Returns the levels between -1 and 1, ascending."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    books = {name: get_4bit_type(name, device="cpu").float().unique() for name in ("nf4", "fp4")}
    return {**books, "uniform": torch.linspace(-1, 1, 15)}


def code_error(values: Tensor, code: Tensor) -> float:
    """Returns the squared error over mean square when each value is rounded to its nearest level."""
    import torch

    places = torch.bucketize(values, (code[1:] + code[:-1]) / 2)
    return float((values - code[places]).square().mean() / values.square().mean())


def spread(seen: Tensor) -> dict[str, Any]:
    """Describes how uneven a layer's inputs are, channel by channel."""
    tops = seen.float().abs().amax(0)
    outliers = int((tops > OUTLIER).sum())
    return {
        "largest": float(tops.max()),
        "median": float(tops.median()),
        "outlier_channels": outliers,
        "channels": len(tops),
    }


def unevenness(seen: Tensor) -> float:
    """Returns the largest channel over the median one."""
    tops = seen.float().abs().amax(0)
    return float(tops.max() / tops.median().clamp_min(1e-12))


def smoothed(seen: Tensor, weight: Tensor) -> dict[str, float]:
    """Returns the error of the layer's int8 output, without and with migration of scales from inputs to weights."""
    from finetune.bench.int8_layers import migration

    x = seen.float()
    scale = migration(x.abs().amax(0), weight.abs().amax(0))
    return {"before": int8_error(x, weight, x, weight), "after": int8_error(x, weight, x / scale, weight * scale)}


def int8_error(x: Tensor, weight: Tensor, scaled: Tensor, rescaled: Tensor) -> float:
    """Returns the relative error of the product when inputs get one scale per tensor and weights one per row."""
    inputs, exact = int8(scaled, scaled.abs().max()), x @ weight.T
    return float((inputs @ symmetric(8, group=0)(rescaled).T - exact).norm() / exact.norm())


def show(study: Study) -> None:
    """Prints the two tables that docs/quantization.md quotes."""
    print("| weights | shows | bits | error |\n|---|---|---|---|")
    for row in study.formats:
        print(f"| {row['format']} | {row['shows']} | {row['bits']:.3f} | {row['rms']:.4f} |")
    print("\n| range of int8 inputs | median error of a layer | worst |\n|---|---|---|")
    for name, errors in study.ranges.items():
        print(f"| {name} | {median(errors):.4f} | {max(errors):.4f} |")


def main() -> None:
    from benchmarks.quantization_layers_page import write_page
    from finetune.bench.off_grid import moved_off_the_grid
    from finetune.bench.quantization import text_rows
    from finetune.bench.quantization_results import QuantizationResult
    from finetune.bench.task import model_overrides
    from finetune.config import load
    from finetune.model import fetch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument(
        "--model", default="smollm2_135m", help="an option of the model group, or a value of model.name"
    )
    parser.add_argument("--grid", choices=("moved", "as_it_is"), default="moved", help="whether to leave a 4-bit grid")
    parser.add_argument("--results", type=Path, help="the JSON line of finetune bench quantization, in a file")
    parser.add_argument("--out", type=Path, default=Path("outputs/quantization_layers.html"))
    arguments = parser.parse_args()
    base = fetch(load(["+experiment=quickstart", *model_overrides(arguments.model)]).model)
    folder = moved_off_the_grid(base) if arguments.grid == "moved" else base.folder
    rows = text_rows(arguments.text, base.folder, ACTIVATION_ROWS * 256)
    results = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results else []
    study = study_layers(folder, rows)
    show(study)
    write_page(
        arguments.out,
        study,
        [QuantizationResult(**result) for result in results],
        model=base.name,
        text=arguments.text.name,
    )
    print(f"the page: {arguments.out}")


if __name__ == "__main__":
    main()
