"""The lab's page: one table, one picture of size against quality, and what lies inside the layers."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from finetune.bench.lab.compare import ROW_TOKENS, Measured, cells
from finetune.bench.lab.known import claims
from finetune.bench.lab.layers import BLOCK, OUTLIER, Study
from finetune.report.markup import Html, figure, joined, section, table, tag
from finetune.report.page import STYLE
from finetune.report.svg import box, decades, dot, frame, path, picture, text, ticks

NAME_WIDTH, NAME_HEIGHT = 60, 14
"""Pixels that a method's name takes in the picture."""

MOVED = (
    "The model was moved off the grid first: it comes from a 4-bit file, and methods whose groups match that file's would look lossless. "
    "A random scale on one side of each weight and its inverse on the other (seed 17) leave what the model computes as it is."
)


def write_page(
    out: Path, found: list[Measured], *, reference: Measured, study: Study, text: str, grid: str, model: str
) -> None:  # fmt: skip
    """Writes the page.

    Args:
        out: The file.
        found: Every backend.
        reference: The same model in float32.
        study: From `layers.study`.
        text: Name of the text.
        grid: ``moved`` or ``as_it_is``.
        model: Its name.
    """
    measured = [one for one in found if one.status == "measured"]
    parts = [
        section("table", "Every way to store the base", results([reference, *measured]), not_run(found)),
        section("picture", "Size against quality", sizes(measured)),
        section("known", "Against what is published", published(found)),
        section("inside", "Inside the layers", errors(study), blocks(study), codes(study)),
        section("outliers", "Outliers", activations(study), smoothing(study)),
    ]
    title = f"Quantization of {model.removeprefix('package:').rpartition('/')[2]}"
    lead = f"Measured on {text} in rows of {ROW_TOKENS} tokens, each in a process of its own. {MOVED if grid == 'moved' else ''}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n<body><header><h1>{escape(title)}</h1></header>\n"
        f"<main>{tag('p', lead)}{joined(parts)}</main>\n<footer>Written by finetune bench quantization.</footer></body></html>\n",
        encoding="utf-8",
    )


def results(lines: list[Measured]) -> Html:
    """Two tables, each as wide as the page."""
    size = [
        "backend",
        "bits a weight",
        "on disk",
        "in memory",
        "make, load: s",
        "perplexity",
        "loss change",
        "KL",
        "top-1",
    ]
    speed = ["backend", "prefill tok/s", "decode tok/s", "task", "HumanEval", "tunable"]
    rows = [cells(one) for one in lines]
    tables = [
        table(size, [row[: len(size)] for row in rows]),
        table(speed, [[row[0], *row[len(size) :]] for row in rows]),
    ]
    return joined([tables[0], tag("h3", "Speed and answers"), tables[1]])


def not_run(found: list[Measured]) -> Html:
    rows = [[one.backend, one.status] for one in found if one.status != "measured"]
    return (
        joined([tag("h3", "Not measured here"), table(["backend", "why"], rows, text_columns=2)]) if rows else Html("")
    )


def published(found: list[Measured]) -> Html:
    rows = [[one.text, one.source, one.seen, "as published" if one.holds else "not here"] for one in claims(found)]
    lead = "Measured on one model and one text; the sources measured larger ones."
    return (
        joined([tag("p", lead), table(["published", "where", "seen", ""], rows, text_columns=4)]) if rows else Html("")
    )


def sizes(measured: list[Measured]) -> Html:
    """Size on disk across, KL upwards on a logarithmic scale."""
    shown = [one for one in measured if one.kl and one.disk_bytes]
    if not shown:
        return Html("")
    lows = decades(min(one.kl or 1 for one in shown), max(one.kl or 1 for one in shown))
    across = ticks(0, max(one.disk_bytes or 0 for one in shown) / 2**20)
    plot = frame(
        box=(70, 40, 640, 320), x_ticks=across, y_ticks=lows, x_name="checkpoint, MiB", y_name="KL to float32, nats a token",
        x_text=lambda value: f"{value:g}", y_text=lambda value: f"{value:g}", log=True,
    )  # fmt: skip
    parts = list(plot.parts)
    placed: list[tuple[float, float]] = []
    for one in sorted(shown, key=lambda one: -(one.kl or 1)):  # from the top: a name moves down where another stands
        x, y = plot.x((one.disk_bytes or 0) / 2**20), plot.y(one.kl or 1)
        line = max(
            [
                y + 4,
                *[
                    other + NAME_HEIGHT
                    for left, other in placed
                    if abs(left - x) < NAME_WIDTH and abs(other - y) < NAME_WIDTH
                ],
            ]
        )
        placed.append((x, line))
        parts += [dot(x, y, 5, kind="bar", title=f"{one.backend}: KL {one.kl}"), text(x + 9, line, one.backend)]
    return figure(
        picture(700, 370, parts, title="size against KL"),
        "Lower left is better: small and near to the model in float32.",
    )


def errors(study: Study) -> Html:
    """Mean per kind of layer and method."""
    kinds = sorted({one["layer"].rpartition(".")[2] for one in study.errors})
    methods = list(dict.fromkeys(one["method"] for one in study.errors))
    rows = []
    for kind in kinds:
        own = [one for one in study.errors if one["layer"].endswith(kind)]
        cells: list[object] = [kind]
        for method in methods:
            some = [one for one in own if one["method"] == method]
            worst = max(some, key=lambda one: one["rms"])
            cells.append(f"{sum(one['rms'] for one in some) / len(some):.3f} ({worst['rms']:.3f}); {max(one['max'] for one in some):.2f}; "
                         f"{min(one['cosine'] for one in some):.3f}")  # fmt: skip
        rows.append(cells)
    caption = tag(
        "p",
        "Root mean square error as a share of the weights' own: mean over layers (worst layer); largest error; smallest cosine.",
    )
    return joined([tag("h3", "Error by kind of layer"), caption, table(["layers", *methods], rows)])


def blocks(study: Study) -> Html:
    rows = [
        [str(one["block"]), f"{one['bits']:.3f}", f"{one['rms']:.4f}", f"{one['double_bits']:.3f}", f"{one['double_rms']:.4f}",
         f"{one['bits'] - one['double_bits']:.3f}"]
        for one in study.blocks
    ]  # fmt: skip
    head = ["block", "NF4 bits", "error", "with double quantization: bits", "error", "bits saved"]
    return joined([tag("h3", "Block size and double quantization"), table(head, rows)])


def codes(study: Study) -> Html:
    """Where the levels lie under the weights' own distribution."""
    left, right, top, bottom = 60, 660, 20, 190
    width, highest = (right - left) / len(study.histogram), max(study.histogram)
    parts = [
        box(round(left + number * width, 1), round(bottom - (bottom - top) * share / highest, 1), round(width - 1, 1),
            round((bottom - top) * share / highest, 1), kind="bar", title=f"{share:.3f}")
        for number, share in enumerate(study.histogram)
    ]  # fmt: skip
    for row, (name, code) in enumerate(study.codes.items()):
        height = bottom + 22 + row * 22
        parts += [text(left - 8, height + 4, name, anchor="end")]
        parts += [
            dot(round(left + (level + 1) / 2 * (right - left), 1), height, 3, kind="bar", title=f"{level:.4f}")
            for level in code
        ]
    caption = (
        "Weights over the largest of their block of "
        + f"{BLOCK}, and the levels of each code. Error over mean square: "
        + ", ".join(f"{name} {error:.5f}" for name, error in study.code_errors.items())
    )
    return figure(picture(700, 270, parts, title="levels and weights"), caption, title="Where the levels lie")


def activations(study: Study) -> Html:
    """Largest and median channel of what each layer reads."""
    shown = study.activations
    lows = decades(max(min(one["median"] for one in shown), 1e-3), max(one["largest"] for one in shown))
    plot = frame(
        box=(70, 40, 660, 300), x_ticks=ticks(0, len(shown)), y_ticks=lows, x_name="linear layer, from the first to the last",
        y_name="largest input", x_text=lambda value: f"{value:g}", y_text=lambda value: f"{value:g}", log=True,
    )  # fmt: skip
    for kind, key in (("line-1", "largest"), ("line-2", "median")):
        points = [(plot.x(number), plot.y(max(one[key], 1e-3))) for number, one in enumerate(shown)]
        plot = type(plot)(x=plot.x, y=plot.y, parts=(*plot.parts, path(points, kind=kind)))
    with_outliers = [one for one in shown if one["outlier_channels"]]
    share = sum(one["outlier_channels"] for one in shown) / sum(one["channels"] for one in shown)
    weights = sorted(shown, key=lambda one: one["weight_unevenness"])
    caption = (
        f"Upper line: the largest channel; lower line: the median one. {len(with_outliers)} of {len(shown)} layers read a channel beyond "
        f"{OUTLIER:g}, {share:.2%} of all channels: these are what LLM.int8 computes in 16 bit. The weights are more even: a layer's "
        f"largest input channel is {weights[len(weights) // 2]['weight_unevenness']:.1f} times its median one in the median layer, "
        f"{weights[-1]['weight_unevenness']:.1f} times in {weights[-1]['layer']}."
    )
    return figure(picture(700, 350, plot.parts, title="outlier channels"), caption, title="Activations")


def smoothing(study: Study) -> Html:
    rows = [[one["layer"], f"{one['before']:.4f}", f"{one['after']:.4f}"] for one in study.smoothing]
    better = math.prod(one["before"] / max(one["after"], 1e-12) for one in study.smoothing) ** (
        1 / max(len(study.smoothing), 1)
    )
    lead = f"Error of a layer's output in int8 with one scale for its inputs; smoothing makes it {better:.1f} times smaller in these layers."
    return joined([tag("h3", "SmoothQuant's migration"), tag("p", lead), table(["layer", "before", "after"], rows)])
