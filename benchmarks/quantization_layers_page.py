"""The page of benchmarks/quantization_layers.py: errors, code books and outliers, and what is published about them."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.published_orderings import check_claims
from benchmarks.quantization_layers import BLOCK, OUTLIER, Study
from finetune.bench.quantization import QuantizationResult
from finetune.bench.quantization_page import write_html
from finetune.report.markup import Html, figure, joined, section, table, tag
from finetune.report.svg import box, decades, dot, frame, path, picture, text, ticks


def write_page(out: Path, study: Study, results: list[QuantizationResult], *, model: str, text: str) -> None:
    """Writes the page; ``results`` are those of `finetune bench quantization`, or empty."""
    parts = [
        section("known", "Compared with what is published", published(results)),
        section("inside", "Inside the layers", errors(study), blocks(study), codes(study)),
        section("outliers", "Outliers", activations(study), smoothing(study)),
    ]
    lead = f"Weights of {model} in float32, and what its layers read in the first rows of {text}."
    command = "python -m benchmarks.quantization_layers"
    write_html(out, title="Quantization inside the layers", lead=lead, parts=parts, command=command)


def published(results: list[QuantizationResult]) -> Html:
    """Lists published claims with what was measured here."""
    rows = [
        [claim.text, claim.source, claim.measured, "as published" if claim.agrees else "not here"]
        for claim in check_claims(results)
    ]
    if not rows:
        return Html("")
    lead = "Measured on one model and one text; the sources measured larger ones."
    return joined([tag("p", lead), table(["published", "where", "measured", ""], rows, text_columns=4)])


def errors(study: Study) -> Html:
    """Shows rounding errors by kind of layer and method."""
    kinds = sorted({error["layer"].rpartition(".")[2] for error in study.errors})
    methods = list(dict.fromkeys(error["method"] for error in study.errors))
    rows: list[list[object]] = []
    for kind in kinds:
        row: list[object] = [kind]
        for method in methods:
            group = [e for e in study.errors if e["layer"].endswith(kind) and e["method"] == method]
            mean_rms = sum(error["rms"] for error in group) / len(group)
            worst_rms, largest = (max(error[key] for error in group) for key in ("rms", "max"))
            cosine = min(error["cosine"] for error in group)
            row.append(f"{mean_rms:.3f} ({worst_rms:.3f}); {largest:.2f}; {cosine:.3f}")
        rows.append(row)
    caption = (
        "Root mean square error as a share of the weights' own: mean over layers (worst layer); largest error; "
        "smallest cosine."
    )
    return joined([tag("h3", "Error by kind of layer"), tag("p", caption), table(["layers", *methods], rows)])


def blocks(study: Study) -> Html:
    """Shows bits and errors of NF4 by block size."""
    rows = [
        [
            str(block["block"]),
            f"{block['bits']:.3f}",
            f"{block['rms']:.4f}",
            f"{block['double_bits']:.3f}",
            f"{block['double_rms']:.4f}",
            f"{block['bits'] - block['double_bits']:.3f}",
        ]
        for block in study.blocks
    ]
    header = ["block", "NF4 bits", "error", "with double quantization: bits", "error", "bits saved"]
    return joined([tag("h3", "Block size and double quantization"), table(header, rows)])


def codes(study: Study) -> Html:
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
    return figure(picture(700, 270, parts, title="levels and weights"), caption, title="Where the levels lie")


def activations(study: Study) -> Html:
    """Draws the largest and the median input channel of each layer."""
    layers = study.activations
    plot = frame(
        box=(70, 40, 660, 300),
        x_ticks=ticks(0, len(layers)),
        y_ticks=decades(max(min(layer["median"] for layer in layers), 1e-3), max(layer["largest"] for layer in layers)),
        x_name="linear layer, from the first to the last",
        y_name="largest input",
        x_text=lambda value: f"{value:g}",
        y_text=lambda value: f"{value:g}",
        log=True,
    )
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
    return figure(picture(700, 350, parts, title="outlier channels"), caption, title="Activations")


def smoothing(study: Study) -> Html:
    """Shows int8 errors without and with SmoothQuant's migration."""
    layers = study.smoothing
    rows = [[layer["layer"], f"{layer['before']:.4f}", f"{layer['after']:.4f}"] for layer in layers]
    ratio = math.prod(layer["before"] / max(layer["after"], 1e-12) for layer in layers) ** (1 / max(len(layers), 1))
    lead = (
        "Error of a layer's output in int8 with one scale for its inputs; smoothing makes it "
        f"{ratio:.1f} times smaller in these layers."
    )
    return joined([tag("h3", "SmoothQuant's migration"), tag("p", lead), table(["layer", "before", "after"], rows)])
