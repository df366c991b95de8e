"""Work in a fresh process, so that nothing but files carries over: a request in, a result out, both JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune.run import to_jsonable, write_json

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12


class FreshProcessError(Exception):
    """The process ended without a result; holds the end of what it said."""


def run_in_fresh_process(
    module: str, request: dict[str, Any], *, work: Path, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Runs ``python -m module request.json`` and reads the result that it wrote.

    Args:
        module: A module whose ``main`` hands `answer` its function.
        request: JSON-able; paths may be `Path`.
        work: Folder for the two files; they are removed after success.
        environment: Variables to add to this process's own.

    Raises:
        FreshProcessError: The process failed.
    """
    asked, got = work / "request.json", work / "result.json"
    got.unlink(missing_ok=True)
    write_json(asked, to_jsonable(request))
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
    done = subprocess.run(
        [sys.executable, "-m", module, str(asked), str(got)], env=variables, capture_output=True, text=True, check=False, errors="replace"
    )  # fmt: skip
    if done.returncode != 0 or not got.is_file():
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-LAST_LINES:])
        raise FreshProcessError(f"python -m {module} ended with code {done.returncode}:\n{tail}")
    result: dict[str, Any] = json.loads(got.read_text())
    asked.unlink()
    got.unlink()
    return result


def answer(function: Any) -> None:
    """The other end: reads the request named on the command line, writes what ``function(request)`` returns."""
    asked, got = Path(sys.argv[1]), Path(sys.argv[2])
    write_json(got, to_jsonable(function(json.loads(asked.read_text()))))
