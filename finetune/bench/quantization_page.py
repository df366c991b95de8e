"""The page of `finetune bench quantization`: two tables, and one picture of size against quality."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from finetune.bench.quantization import ROW_TOKENS, QuantizationResult, cells
from finetune.report.markup import Html, figure, joined, section, table, tag
from finetune.report.page import STYLE
from finetune.report.svg import decades, dot, frame, picture, text, ticks

NAME_WIDTH, NAME_HEIGHT = 60, 14
"""Pixels that a method's name takes in the picture."""

MIB = 2**20
SIZES = (
    "backend",
    "bits a weight",
    "on disk",
    "in memory",
    "make, load: s",
    "perplexity",
    "loss change",
    "KL",
    "top-1",
)
SPEEDS = ("backend", "prefill tok/s", "decode tok/s", "task", "HumanEval", "tunable")
MOVED = (
    "The model was moved off the grid first: it comes from a 4-bit file, and methods whose groups match that file's "
    "would look lossless. A random scale on one side of each weight and its inverse on the other (seed 17) leave what "
    "the model computes unchanged."
)


def write_page(
    out: Path, results: list[QuantizationResult], *, reference: QuantizationResult, text: str, grid: str, model: str
) -> None:
    """Writes the page.

    Args:
        out: The file.
        results: Every backend.
        reference: The same model in float32.
        text: Name of the text.
        grid: ``moved`` or ``as_it_is``.
        model: Its name.
    """
    measured = [result for result in results if result.status == "measured"]
    parts = [
        section("table", "Every way to store the base", result_tables([reference, *measured]), not_run(results)),
        section("picture", "Size against quality", size_picture(measured)),
    ]
    moved = MOVED if grid == "moved" else ""
    lead = f"Measured on {text} in rows of {ROW_TOKENS} tokens, each in its own process. {moved}"
    title = f"Quantization of {model.removeprefix('package:').rpartition('/')[2]}"
    write_html(out, title=title, lead=lead, parts=parts, command="finetune bench quantization")


def write_html(out: Path, *, title: str, lead: str, parts: Iterable[Html], command: str) -> None:
    """Writes one HTML file in the report's style."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1></header>\n<main>{tag('p', lead)}{joined(parts)}</main>\n"
        f"<footer>Written by {escape(command)}.</footer></body></html>\n",
        encoding="utf-8",
    )


def result_tables(results: list[QuantizationResult]) -> Html:
    """Returns two tables, each as wide as the page."""
    rows = [cells(result) for result in results]
    sizes = table(SIZES, [row[: len(SIZES)] for row in rows])
    speeds = table(SPEEDS, [[row[0], *row[len(SIZES) :]] for row in rows])
    return joined([sizes, tag("h3", "Speed and answers"), speeds])


def not_run(results: list[QuantizationResult]) -> Html:
    """Lists the backends that were not measured, with the reason."""
    rows = [[result.backend, result.status] for result in results if result.status != "measured"]
    if not rows:
        return Html("")
    return joined([tag("h3", "Not measured here"), table(["backend", "why"], rows, text_columns=2)])


def size_picture(measured: list[QuantizationResult]) -> Html:
    """Draws KL over size on disk, on a logarithmic scale."""
    points = [(r.backend, r.disk_bytes / MIB, r.kl) for r in measured if r.kl and r.disk_bytes]
    if not points:
        return Html("")
    plot = frame(
        box=(70, 40, 640, 320),
        x_ticks=ticks(0, max(size for _, size, _ in points)),
        y_ticks=decades(min(kl for *_, kl in points), max(kl for *_, kl in points)),
        x_name="checkpoint, MiB",
        y_name="KL to float32, nats a token",
        x_text=lambda value: f"{value:g}",
        y_text=lambda value: f"{value:g}",
        log=True,
    )
    parts = list(plot.parts)
    placed: list[tuple[float, float]] = []
    for name, size, kl in sorted(
        points, key=lambda point: -point[2]
    ):  # from the top: a label moves below its neighbours
        x, y = plot.x(size), plot.y(kl)
        near = [above for left, above in placed if abs(left - x) < NAME_WIDTH and abs(above - y) < NAME_WIDTH]
        height = max([y + 4, *[above + NAME_HEIGHT for above in near]])
        placed.append((x, height))
        parts += [dot(x, y, 5, kind="bar", title=f"{name}: KL {kl}"), text(x + 9, height, name)]
    caption = "Lower left is better: small, and close to the model in float32."
    return figure(picture(700, 370, parts, title="size against KL"), caption)
