"""The page of benchmarks/quantization_layers.py: errors, code books and outliers, and what is published about them."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

from benchmarks.published_orderings import check_claims
from benchmarks.quantization_layers import BLOCK, OUTLIER, Study
from finetune.bench.quantization_results import QuantizationResult
from finetune.html import Figure, Section, Table, render
from finetune.html.svg import Axis, box, decades, dot, frame, path, picture, text, ticks


def write_page(out: Path, study: Study, results: list[QuantizationResult], *, model: str, text: str) -> None:
    """Writes the page; ``results`` are those of `finetune bench quantization`, or empty."""
    page = render(
        "sections.html",
        title="Quantization inside the layers",
        lead=f"Weights of {model} in float32, and what its layers read in the first rows of {text}.",
        command="python -m benchmarks.quantization_layers",
        sections=[
            Section(title="Compared with what is published", parts=[published(results)]),
            Section(title="Inside the layers", parts=[formats(study), errors(study), blocks(study), codes(study)]),
            Section(title="Outliers", parts=[activations(study), ranges(study), smoothing(study)]),
        ],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def published(results: list[QuantizationResult]) -> Table:
    """Lists published claims with what was measured here."""
    return Table(
        header=["published", "where", "measured", ""],
        rows=[
            [claim.text, claim.source, claim.measured, "as published" if claim.agrees else "not here"]
            for claim in check_claims(results)
        ],
        text_columns=4,
        caption="Measured on one model and one text; the sources measured larger ones.",
    )


def formats(study: Study) -> Table:
    """Shows bits and errors of the formats of weights."""
    rows = [[row["format"], row["shows"], f"{row['bits']:.3f}", f"{row['rms']:.4f}"] for row in study.formats]
    caption = "Root mean square error over every eighth layer, as a share of the weights' own; bits with scales."
    header = ["format", "what it shows", "bits a weight", "error"]
    return Table(header=header, rows=rows, text_columns=2, title="Formats of weights", caption=caption)


def ranges(study: Study) -> Table:
    """Shows errors of int8 inputs by how their range ends."""
    rows = [[name, f"{median(errors):.4f}", f"{max(errors):.4f}"] for name, errors in study.ranges.items()]
    caption = (
        "Relative error of a layer's output with int8 inputs and exact weights, over every eighth layer. Static ranges "
        "are chosen on one half of the tokens and measured on the other."
    )
    header = ["range", "median layer", "worst layer"]
    return Table(header=header, rows=rows, title="Where the range of the inputs ends", caption=caption)


def errors(study: Study) -> Table:
    """Shows rounding errors by kind of layer and method."""
    kinds = sorted({error["layer"].rpartition(".")[2] for error in study.errors})
    methods = list(dict.fromkeys(error["method"] for error in study.errors))
    rows = []
    for kind in kinds:
        row = [kind]
        for method in methods:
            group = [error for error in study.errors if error["layer"].endswith(kind) and error["method"] == method]
            mean_rms = sum(error["rms"] for error in group) / len(group)
            worst_rms, largest = (max(error[key] for error in group) for key in ("rms", "max"))
            cosine = min(error["cosine"] for error in group)
            row.append(f"{mean_rms:.3f} ({worst_rms:.3f}); {largest:.2f}; {cosine:.3f}")
        rows.append(row)
    caption = (
        "Root mean square error as a share of the weights' own: mean over layers (worst layer); largest error; "
        "smallest cosine."
    )
    return Table(header=["layers", *methods], rows=rows, title="Error by kind of layer", caption=caption)


def blocks(study: Study) -> Table:
    """Shows bits and errors of NF4 by block size."""
    rows = []
    for block in study.blocks:
        saved = f"{block['bits'] - block['double_bits']:.3f}"
        single, double = (f"{block['bits']:.3f}", f"{block['rms']:.4f}"), f"{block['double_bits']:.3f}"
        rows.append([str(block["block"]), *single, double, f"{block['double_rms']:.4f}", saved])
    header = ["block", "NF4 bits", "error", "with double quantization: bits", "error", "bits saved"]
    return Table(header=header, rows=rows, title="Block size and double quantization")


def codes(study: Study) -> Figure:
    """Draws the levels of each code under the distribution of the weights."""
    left, right, top, bottom = 60, 660, 20, 190
    width, highest = (right - left) / len(study.histogram), max(study.histogram)
    parts = []
    for number, share in enumerate(study.histogram):
        height = (bottom - top) * share / highest
        corner = round(left + number * width, 1), round(bottom - height, 1)
        parts.append(box(*corner, round(width - 1, 1), round(height, 1), kind="bar", title=f"{share:.3f}"))
    for row, (name, code) in enumerate(study.codes.items()):
        y = bottom + 22 + row * 22
        parts.append(text(left - 8, y + 4, name, anchor="end"))
        for level in code:
            x = round(left + (level + 1) / 2 * (right - left), 1)
            parts.append(dot(x, y, 3, kind="bar", title=f"{level:.4f}"))
    code_errors = ", ".join(f"{name} {error:.5f}" for name, error in study.code_errors.items())
    caption = (
        f"Weights over the largest of their block of {BLOCK}, and the levels of each code. "
        f"Error over mean square: {code_errors}"
    )
    shown = picture(700, 270, parts, title="levels and weights")
    return Figure(picture=shown, caption=caption, title="Where the levels lie")


def activations(study: Study) -> Figure:
    """Draws the largest and the median input channel of each layer."""
    layers = study.activations
    heights = decades(max(min(layer["median"] for layer in layers), 1e-3), max(layer["largest"] for layer in layers))
    x_axis = Axis(ticks=ticks(0, len(layers)), name="linear layer, from the first to the last")
    plot = frame((70, 40, 660, 300), x=x_axis, y=Axis(ticks=heights, name="largest input", log=True))
    parts = list(plot.parts)
    for kind, key in (("line-1", "largest"), ("line-2", "median")):
        points = [(plot.x(number), plot.y(max(layer[key], 1e-3))) for number, layer in enumerate(layers)]
        parts.append(path(points, kind=kind))
    with_outliers = sum(layer["outlier_channels"] > 0 for layer in layers)
    share = sum(layer["outlier_channels"] for layer in layers) / sum(layer["channels"] for layer in layers)
    by_weight = sorted(layers, key=lambda layer: layer["weight_unevenness"])
    median, worst = by_weight[len(by_weight) // 2], by_weight[-1]
    caption = (
        f"Upper line: the largest channel; lower line: the median one. {with_outliers} of {len(layers)} layers read a "
        f"channel beyond {OUTLIER:g}, {share:.2%} of all channels: these are what LLM.int8 computes in 16 bit. The "
        f"weights are more even: a layer's largest input channel is {median['weight_unevenness']:.1f} times its median "
        f"one in the median layer, {worst['weight_unevenness']:.1f} times in {worst['layer']}."
    )
    return Figure(picture=picture(700, 350, parts, title="outlier channels"), caption=caption, title="Activations")


def smoothing(study: Study) -> Table:
    """Shows int8 errors without and with SmoothQuant's migration."""
    layers = study.smoothing
    rows = [[layer["layer"], f"{layer['before']:.4f}", f"{layer['after']:.4f}"] for layer in layers]
    ratio = math.prod(layer["before"] / max(layer["after"], 1e-12) for layer in layers) ** (1 / max(len(layers), 1))
    caption = (
        "Error of a layer's output in int8 with one scale for its inputs; smoothing makes it "
        f"{ratio:.1f} times smaller in these layers."
    )
    return Table(header=["layer", "before", "after"], rows=rows, title="SmoothQuant's migration", caption=caption)
