"""The page of `finetune bench quantization`: two tables, and one picture of size against quality."""

from __future__ import annotations

from pathlib import Path

from finetune.bench.quantization import ROW_TOKENS
from finetune.bench.quantization_results import QuantizationResult, cells
from finetune.html import Figure, Section, Table, render
from finetune.html.svg import Axis, decades, dot, frame, picture, text, ticks

NAME_WIDTH, NAME_HEIGHT = 60, 14
"""Pixels that a method's name takes in the picture."""

MIB = 2**20
SIZES = (
    "method",
    "bits a weight",
    "on disk",
    "in memory",
    "make, load: s",
    "perplexity",
    "loss change",
    "KL",
    "top-1",
)
SPEEDS = (
    "method",
    "prefill tok/s: batch 1, 4, 16",
    "decode tok/s: batch 1, 4, 16",
    "task",
    "HumanEval pass@1",
    "pass@10",
    "tunable",
    "kernels",
)
READ_SIZES = (
    "Bits count scales and zero points. KL and top-1 compare each next token with the model in float32; loss change is "
    "in nats a token, with its 95 % interval over rows. Make: from the base in 16 bits to the files; load: from them."
)
READ_SPEEDS = (
    "Prefill reads prompts of 256 tokens; decode writes 24 tokens after 16. torch decodes weights for each product; "
    "llama.cpp and ONNX Runtime have kernels for their own formats. Intervals are 95 %, over rows and over problems."
)
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
        results: Every method.
        reference: The same model in float32.
        text: Name of the text.
        grid: ``moved`` or ``as_it_is``.
        model: Its name.
    """
    measured = [result for result in results if result.status == "measured"]
    moved = MOVED if grid == "moved" else ""
    tables = [*result_tables([reference, *measured]), not_run(results)]
    page = render(
        "sections.html",
        title=f"Quantization of {model.removeprefix('package:').rpartition('/')[2]}",
        lead=f"Measured on {text} in rows of {ROW_TOKENS} tokens, each in its own process. {moved}",
        command="finetune bench quantization",
        sections=[
            Section(title="Every way to store the model", parts=tables),
            Section(title="Size against quality", parts=[size_figure(measured)]),
        ],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def result_tables(results: list[QuantizationResult]) -> list[Table]:
    """Returns two tables, each as wide as the page."""
    rows = [cells(result) for result in results]
    sizes = Table(header=SIZES, rows=[row[: len(SIZES)] for row in rows], caption=READ_SIZES)
    speeds = [[row[0], *row[len(SIZES) :]] for row in rows]
    return [sizes, Table(header=SPEEDS, rows=speeds, title="Speed and answers", caption=READ_SPEEDS)]


def not_run(results: list[QuantizationResult]) -> Table:
    """Lists the methods that were not measured, with the reason."""
    rows = [[result.backend, result.status] for result in results if result.status != "measured"]
    return Table(header=["method", "why"], rows=rows, text_columns=2, title="Not measured here")


def size_figure(measured: list[QuantizationResult]) -> Figure:
    """Draws KL over size on disk, on a logarithmic scale."""
    caption = "Lower left is better: small, and close to the model in float32."
    points = [
        (result.backend, result.disk_bytes / MIB, result.kl) for result in measured if result.kl and result.disk_bytes
    ]
    if not points:
        return Figure(picture="")
    sizes, kls = [size for _, size, _ in points], [kl for *_, kl in points]
    x_axis = Axis(ticks=ticks(0, max(sizes)), name="checkpoint, MiB")
    y_axis = Axis(ticks=decades(min(kls), max(kls)), name="KL to float32, nats per token", log=True)
    plot = frame((70, 40, 640, 320), x=x_axis, y=y_axis)
    parts = list(plot.parts)
    placed: list[tuple[float, float]] = []
    for name, size, kl in sorted(
        points, key=lambda point: -point[2]
    ):  # from the top: a name moves below its neighbours
        x, y = plot.x(size), plot.y(kl)
        near = [above for left, above in placed if abs(left - x) < NAME_WIDTH and abs(above - y) < NAME_WIDTH]
        height = max([y + 4, *[above + NAME_HEIGHT for above in near]])
        placed.append((x, height))
        parts += [dot(x, y, 5, kind="bar", title=f"{name}: KL {kl}"), text(x + 9, height, name)]
    return Figure(picture=picture(700, 370, parts, title="size against KL"), caption=caption)
