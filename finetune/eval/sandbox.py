"""Runs programs that a model wrote, each in a restricted process with a time limit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
REPORT_BYTES = 4096
"""Bytes read of a report; a reason has 200 characters at most."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resources of one program. It has no network, starts no process or thread, and writes only into its own folder.

    Attributes:
        seconds: Wall time, the start of Python included.
        cpu_seconds: CPU time.
        memory_bytes: Address space.
        file_bytes: Size of any one file.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 1024**3
    file_bytes: int = 1024**2

    def resources(self) -> dict[str, int]:
        """Returns the limits by their name in `resource`: also no core file, and no further process of this user."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NPROC": 1,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a program ended.

    Attributes:
        outcome: ``passed`` (it ran to its end and raised nothing), ``failed`` or ``timed out``.
        reason: What it raised, or which limit ended it; empty if it passed.
        unenforced: Restrictions that this machine could not enforce; empty on Linux 5.13 or newer on x86_64 and
            aarch64.
    """

    outcome: str
    reason: str
    unenforced: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.outcome == PASSED


def run_program(program: str, *, limits: Limits | None = None) -> Verdict:
    """Runs Python source with its tests at its end: it passes if nothing is raised.

    Its output is discarded. It starts with an empty environment in an empty folder that is removed afterwards.

    Args:
        program: Source, run as a module named ``program``, so that a block under ``__name__ == "__main__"`` does not
            run.
        limits: None means the defaults.
    """
    limits = limits or Limits()
    request = json.dumps({"program": program, "limits": limits.resources()}).encode()
    with (
        tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as report,
    ):
        # Reading a pipe blocks until every process closes its other end. A file does not block, and has a size limit.
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(request, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Verdict(TIMED_OUT, f"ran for more than {limits.seconds:g} s", ())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report.seek(0)
        return _verdict(report.read(REPORT_BYTES), process.returncode, limits)


def _verdict(report: bytes, code: int, limits: Limits) -> Verdict:
    if code == -signal.SIGXCPU:
        return Verdict(TIMED_OUT, f"computed for more than {limits.cpu_seconds} s", ())
    if code < 0:
        return Verdict(FAILED, f"ended by {signal.Signals(-code).name}", ())
    try:
        result = json.loads(report)
    except ValueError:
        return Verdict(FAILED, "ended before its last line", ())
    return Verdict(PASSED if result["passed"] else FAILED, result["reason"], tuple(result["unenforced"]))
