"""Plants each bug of tests/preflight/bugs.py and prints which proof of the rehearsal caught it, and with which figure.

python scripts/planted_bugs.py [fast]

The models are random Llamas of two layers in NF4, the trainer is the run's own. ``fast`` leaves out what starts a second
process. The table is Markdown; the last line is JSON, and the exit code is 1 where a bug went through.
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
WIDEST = 160
"""Characters of a message in the table."""


class Rows:
    """A pytest plugin that keeps what each planted bug led to."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if report.when == "call" and name == "row" and isinstance(value, dict):
                self.rows.append({**value, "caught": report.passed})


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    rows, chosen = Rows(), ["-m", "not slow"] if "fast" in arguments else []
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(
            [str(TESTS), "-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider", *chosen], plugins=[rows]
        )
    if not rows.rows:
        sys.stdout.write(said.getvalue())
        return 1
    lines = ["| planted bug | proof that caught it | found | bound |", "|---|---|---|---|"]
    for row in rows.rows:
        found = " ".join(str(row["found"]).replace("|", "\\|").split())
        shown = found if len(found) <= WIDEST else f"{found[:WIDEST]}..."
        lines.append(f"| {row['bug']} | {row['proof'] if row['caught'] else 'NOT CAUGHT'} | {shown} | {row['bound']} |")
    caught = sum(row["caught"] for row in rows.rows)
    sys.stdout.write("\n".join(lines) + "\n" + json.dumps({"bugs": len(rows.rows), "caught": caught}) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
