"""Runs work in a fresh process, which shares nothing but files: a request in, a result out, both JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.jsonable import to_jsonable
from finetune.run import write_json
from finetune.system_errors import as_system_error

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12


class FreshProcessError(Exception):
    """The process ended without a result; the message has the end of its output."""


def run_in_fresh_process(
    module: str, request: dict[str, Any], *, work: Path, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Runs ``python -m module request.json result.json`` and returns the result.

    Args:
        module: A module whose ``main`` passes its function to `serve_request`.
        request: JSON values; paths may be `Path`.
        work: Folder for the two files; they are removed after success.
        environment: Variables to add to those of this process.

    Raises:
        FreshProcessError: The process failed.
        OSError: It failed because the disk is full, or for another reason of the system.
    """
    request_file, result_file = work / "request.json", work / "result.json"
    result_file.unlink(missing_ok=True)
    write_json(request_file, to_jsonable(request))
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
    command = [sys.executable, "-m", module, str(request_file), str(result_file)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode != 0 or not result_file.is_file():
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-LAST_LINES:])
        failure = FreshProcessError(f"python -m {module} ended with code {done.returncode}:\n{tail}")
        raise as_system_error(failure, work) or failure
    result: dict[str, Any] = json.loads(result_file.read_text())
    request_file.unlink()
    result_file.unlink()
    return result


def serve_request(function: Callable[[dict[str, Any]], Any]) -> None:
    """Reads the request file named on the command line, and writes what ``function(request)`` returns."""
    request_file, result_file = Path(sys.argv[1]), Path(sys.argv[2])
    write_json(result_file, to_jsonable(function(json.loads(request_file.read_text()))))
