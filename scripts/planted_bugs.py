"""Plants each bug of tests/preflight/bugs.py and prints which check caught it, and with which figure.

python scripts/planted_bugs.py [fast]

The models are random Llamas of two layers in NF4, the trainer is the run's own. ``fast`` leaves out the bugs that need
a second process. The table is Markdown; the last line is JSON, and the exit code is 1 where a bug was not caught.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "preflight" / "test_planted_bugs.py"
MAX_CHARACTERS = 160
"""Length to which figures in the table are cut."""


class Recorder:
    """A pytest plugin that records the result of each planted bug."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the property that the test recorded."""
        for name, value in report.user_properties:
            if report.when == "call" and name == "row" and isinstance(value, dict):
                self.rows.append({**value, "caught": report.passed})


def main(arguments: list[str]) -> int:
    """Prints the table and returns the exit code."""
    recorder, chosen = Recorder(), ["-m", "not slow"] if "fast" in arguments else []
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main(
            [str(TESTS), "-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider", *chosen], plugins=[recorder]
        )
    if not recorder.rows:
        sys.stdout.write(output.getvalue())
        return 1
    lines = ["| planted bug | check that caught it | figure | bound |", "|---|---|---|---|"]
    for row in recorder.rows:
        figure = " ".join(str(row["figure"]).replace("|", "\\|").split())
        shown = figure if len(figure) <= MAX_CHARACTERS else f"{figure[:MAX_CHARACTERS]}..."
        lines.append(f"| {row['bug']} | {row['check'] if row['caught'] else 'NOT CAUGHT'} | {shown} | {row['bound']} |")
    caught = sum(row["caught"] for row in recorder.rows)
    sys.stdout.write("\n".join(lines) + "\n" + json.dumps({"bugs": len(recorder.rows), "caught": caught}) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
