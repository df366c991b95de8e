"""Two runs compared: on the console, and as a page next to the figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.console import change_text, log, table
from finetune.files import atomic_write_text
from finetune.html import Table, render
from finetune.html.format import MISSING, number
from finetune.report.answers import answer_text, last_request
from finetune.report.run_data import Fields
from finetune.report.titles import ARTIFACTS, metric_title

SHOWN_ROWS = 5
TEXT_WIDTH = 34
"""Letters of a request or an answer that fit into a column of the console."""


def show_comparison(comparison: Fields, file: Path) -> None:
    """Prints what two runs differ in and writes the same, with longer answers, as a page.

    Args:
        comparison: From `finetune.eval.compare.compare`.
        file: The page.
    """
    first, second = comparison["runs"]
    log("eval", *comparison["remarks"])
    log(
        "eval",
        f"{first} and {second}, {_rows_text(comparison)}; "
        f"differences are {second} minus {first}, paired by row, with 95 % intervals",
    )
    width = max(map(len, comparison["artifacts"]))
    cells = [
        [f"{name if not index else '':<{width}}  {metric}", *others]
        for name, artifact in comparison["artifacts"].items()
        for index, (metric, *others) in enumerate(_figures(artifact))
    ]
    table("eval", ["artifact", first, second, "difference", ""], cells)
    shipped = list(comparison["artifacts"])[-1]
    changed = comparison["artifacts"][shipped]["changed"]
    if changed:
        log("eval", f"{shipped}: the rows that changed most; more of them in {file}")
        heads = ["request", first, second, f"scores of {first}", f"of {second}"]
        table("eval", heads, [_console_cells(row) for row in changed[:SHOWN_ROWS]])
    atomic_write_text(file, page(comparison))


def page(comparison: Fields) -> str:
    """Returns the whole page."""
    first, second = comparison["runs"]
    artifacts = []
    for name, artifact in comparison["artifacts"].items():
        rows = [[metric_title(metric), *cells] for metric, *cells in _figures(artifact)]
        strong = frozenset(index for index, row in enumerate(rows) if row[-1] in ("higher", "lower"))
        figures = Table(header=["", first, second, "Difference", ""], rows=rows, strong=strong)
        changed = [_changed_row(row) for row in artifact["changed"]]
        artifacts.append({"title": ARTIFACTS.get(name, name), "figures": figures, "changed": changed})
    return render("comparison.html", comparison=comparison, rows=_rows_text(comparison), artifacts=artifacts)


def _rows_text(comparison: Fields) -> str:
    shared = {kind: overlap["shared"] for kind, overlap in comparison["rows"].items()}
    return f"{shared['answers']} shared rows for answers and {shared['loss']} for the loss"


def _figures(artifact: Fields) -> Iterator[list[str]]:
    """Yields metric, both levels, the difference with its interval, and what that means."""
    for name, figure in artifact["figures"].items():
        yield [name, *[f"{level:.4f}" for level in figure["levels"]], change_text(figure), _verdict(figure)]


def _verdict(figure: Fields) -> str:
    if figure["low"] == figure["high"] == 0:
        return "the same"
    return "higher" if figure["low"] > 0 else "lower" if figure["high"] < 0 else "may be chance"


def _changed_row(row: Fields) -> Fields:
    return {
        "request": _request(row),
        "reference": answer_text(row["reference"]),
        "answers": [None if answer is None else answer_text(answer) for answer in row["answers"]],
        "scores": [[f"{metric_title(name)} {number(value)}" for name, value in run.items()] for run in row["scores"]],
    }


def _request(row: Fields) -> str:
    return MISSING if row["prompt"] is None else last_request(row["prompt"])


def _console_cells(row: Fields) -> list[str]:
    texts = [_request(row), *[MISSING if answer is None else answer for answer in row["answers"]]]
    scores = [" ".join(f"{value:.2f}" for value in run.values()) for run in row["scores"]]
    return [*map(_one_line, texts), *scores]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"
