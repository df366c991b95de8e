"""Two runs side by side: on the console, and as a page of its own beside the figures."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from finetune.console import change_text, log, table
from finetune.files import atomic_write_text
from finetune.report.answers import code, last_request
from finetune.report.format import ARTIFACTS, MISSING, metric_title, number
from finetune.report.markup import Html, folded, joined, section, tag
from finetune.report.markup import table as html_table
from finetune.report.page import STYLE
from finetune.report.run_data import Fields

SHOWN_ROWS = 5
TEXT_WIDTH = 34
"""Letters of a request or an answer that fit beside each other on the console."""


def show_comparison(comparison: Fields, file: Path) -> None:
    """Prints what two runs differ in and writes the same, with longer answers, as a page.

    Args:
        comparison: From `finetune.eval.compare.compare`.
        file: The page.
    """
    one, two = comparison["runs"]
    log("eval", *comparison["remarks"])
    log(
        "eval",
        f"{one} against {two}, {_rows(comparison)}; differences are {two} minus {one}, paired by row, with 95 % intervals",
    )
    width = max(map(len, comparison["artifacts"]))
    cells = [
        [f"{name if not index else '':<{width}}  {metric}", *others]
        for name, artifact in comparison["artifacts"].items()
        for index, (metric, *others) in enumerate(_figures(artifact))
    ]
    table("eval", ["artifact", one, two, "difference", ""], cells)
    name, changed = _last_changed(comparison)
    if changed:
        log("eval", f"{name}: the rows that changed most; more of them in {file}")
        heads = ["request", one, two, f"scores of {one}", f"of {two}"]
        table("eval", heads, [[_short(text) for text in _texts(row)] + _scores(row) for row in changed[:SHOWN_ROWS]])
    atomic_write_text(file, page(comparison))


def page(comparison: Fields) -> str:
    """The whole page; it asks the network for nothing and runs no script."""
    one, two = comparison["runs"]
    title = f"{one} against {two}"
    name, _ = _last_changed(comparison)
    artifacts = list(comparison["artifacts"].items())
    figures = [joined([tag("h3", ARTIFACTS.get(key, key)), _figure_table(found, one, two)]) for key, found in artifacts]
    remarks = [tag("p", remark, kind="caption") for remark in comparison["remarks"]]
    told = f"Measured on {_rows(comparison)}. Differences are {two} minus {one}, paired by row, with 95 % intervals."
    changed = [_answers(key, found["changed"], one, two, opened=key == name) for key, found in reversed(artifacts)]
    parts = [
        section("figures", "How they differ", tag("p", told), *remarks, *figures),
        section("changes", "Rows that changed most", *changed),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}: two runs compared</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n<body>\n"
        f'<header><div><span class="eyebrow">Two runs compared</span><h1>{escape(title)}</h1></div></header>\n'
        f"<main>{joined(parts)}</main>\n"
        "<footer>Written by finetune. Figures and whole answers are in the JSON file beside this page.</footer></body></html>\n"
    )


def _rows(comparison: Fields) -> str:
    shared = {what: found["shared"] for what, found in comparison["rows"].items()}
    return f"{shared['answers']} shared rows for answers and {shared['loss']} for the loss"


def _figures(artifact: Fields) -> Iterator[list[str]]:
    """Metric, both levels, difference with its interval, and what that says."""
    for name, found in artifact["figures"].items():
        yield [name, *[f"{level:.4f}" for level in found["levels"]], change_text(found), _verdict(found)]


def _verdict(found: Fields) -> str:
    if found["low"] == found["high"] == 0:
        return "the same"
    return "higher" if found["low"] > 0 else "lower" if found["high"] < 0 else "may be chance"


def _figure_table(artifact: Fields, one: str, two: str) -> Html:
    rows = [[metric_title(name), *cells] for name, *cells in _figures(artifact)]
    strong = frozenset(index for index, row in enumerate(rows) if row[-1] in ("higher", "lower"))
    return html_table(["", one, two, "Difference", ""], rows, strong=strong)


def _answers(artifact: str, changed: list[Fields], one: str, two: str, *, opened: bool) -> Html:
    rows = [
        [_request(row), code(row["reference"]), *[_answer(row, run) for run in range(2)]] for row in changed
    ]  # fmt: skip
    title = ARTIFACTS.get(artifact, artifact)
    content = html_table(["Request", "Right answer", one, two], rows, text_columns=4) or tag("p", "No row changed.")
    return joined([tag("h3", title), content]) if opened else folded(title, content)


def _answer(row: Fields, run: int) -> Html:
    scores = ", ".join(f"{metric_title(name)} {number(value)}" for name, value in row["scores"][run].items())
    answer = [code(row["answers"][run]), Html("<br>")] if row["answers"][run] is not None else []
    return joined([*answer, tag("span", scores, kind="caption")])


def _last_changed(comparison: Mapping[str, Fields]) -> tuple[str, list[Fields]]:
    """The last artifact of the line: what is shipped."""
    name = list(comparison["artifacts"])[-1]
    return name, comparison["artifacts"][name]["changed"]


def _texts(row: Fields) -> list[str]:
    return [_request(row), *[MISSING if answer is None else answer for answer in row["answers"]]]


def _request(row: Fields) -> str:
    return MISSING if row["prompt"] is None else last_request(row["prompt"])


def _scores(row: Fields) -> list[str]:
    return [" ".join(f"{value:.2f}" for value in scores.values()) for scores in row["scores"]]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"
