"""README's figures of the quickstart are those of this checkout's last run, within their 95 % intervals.

The last run is the one that `make quickstart` leaves in ``outputs/quickstart``. A checkout without one has nothing to
compare; the comparison itself is tested on a run that is written here.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.report import report
from tests.report.conftest import write_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAST_RUN = ROOT / "outputs" / "quickstart" / "report.json"
TITLES = {"base": "Base model", "adapter": "Quantized base + adapter", "merged": "Merged: ", "GGUF Q8_0": "Export gguf"}
"""Beginning of an artifact's title in the report, by README's column."""

EXACT, LOSS = "answer exactly right", "held-out loss"
TABLE = """
| {answers} held-out requests, that machine | base | adapter | merged | GGUF Q8_0 |
|---|---|---|---|---|
| answer exactly right | 0.00 | 0.63 [0.56, 0.70] | 0.64 [0.57, 0.71] | 0.90 [0.87, 0.93] |
| held-out loss ({losses} rows), nats per token | 2.71 | {loss} | 0.121 | 0.121 |
"""
"""README's table with the figures of the run that ``tests.report.conftest`` writes."""


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("| ").split("|")]


def table(readme: str) -> list[list[str]]:
    lines = readme.splitlines()
    start = next(index for index, line in enumerate(lines) if re.match(r"\| \d+ held-out requests", line))
    return [cells(line) for line in (lines[start], *lines[start + 2 : start + 4])]


def differences(readme: str, content: dict[str, Any]) -> Iterator[str]:
    """Yields each figure of README outside the run's interval whose own interval lacks the figure of the run."""
    (first, *columns), *rows = table(readme)
    for name, *values in rows:
        counted = first if name == EXACT else name
        for column, cell in zip(columns, values, strict=True):
            found = [entry for entry in content["artifacts"] if entry["title"].startswith(TITLES[column])]
            entry = next((entry for entry in found if entry["kept"]), found[0])
            keys = ("value", "low", "high") if name == EXACT else ("loss", "loss_low", "loss_high")
            value, low, high = ((entry["metrics"]["json_exact"] if name == EXACT else entry)[key] for key in keys)
            written, *ends = map(float, re.findall(r"[\d.]+", cell))
            rounding = 0.5 * 10 ** -len(cell.split()[0].partition(".")[2])
            is_outside = not low - rounding <= written <= high + rounding
            if is_outside and not (ends and ends[0] <= value <= ends[1]):
                yield f"{name}, {column}: README has {cell}, the run {value:.4f} [{low:.4f}, {high:.4f}]"
            count = entry["answer_rows" if name == EXACT else "loss_rows"]
            if str(count) not in re.findall(r"\d+", counted):
                yield f"{name}, {column}: the run measured {count} rows"


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """report.json of a run; all artifacts answered the same number of rows, as in the quickstart."""
    content = json.loads(report(write_run(tmp_path / "quickstart")).json.read_text())
    answered = [entry | {"answer_rows": 160} for entry in content["artifacts"]]
    return content | {"artifacts": answered}


def test_figures_of_readme_are_those_of_the_last_run() -> None:
    if LAST_RUN.is_file():
        assert not list(differences(README, json.loads(LAST_RUN.read_text())))
    assert [row[0].partition(" (")[0] for row in table(README)[1:]] == [EXACT, LOSS]
    assert set(table(README)[0][1:]) == set(TITLES)


def test_figures_inside_the_intervals_agree(content: dict[str, Any]) -> None:
    assert not list(differences(TABLE.format(answers=160, losses=160, loss="0.118"), content))


@pytest.mark.parametrize(
    ("answers", "losses", "loss", "found"),
    [
        (160, 160, "0.150", ["held-out loss (160 rows), nats per token, adapter: README has 0.150, the run 0.1210"]),
        (48, 160, "0.121", 4 * ["answer exactly right, "]),
        (160, 48, "0.121", 4 * ["held-out loss (48 rows)"]),
    ],
)
def test_figures_and_rows_of_another_run_are_named(
    content: dict[str, Any], answers: int, losses: int, loss: str, found: list[str]
) -> None:
    named = list(differences(TABLE.format(answers=answers, losses=losses, loss=loss), content))
    assert [line.startswith(start) for line, start in zip(named, found, strict=True)] == [True] * len(found)
