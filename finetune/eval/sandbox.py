"""Runs programs that a model wrote: each in a process of its own that can do little and not for long."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

JAIL = Path(__file__).with_name("jail.py")
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
REPORT_BYTES = 4096
"""What is read of a report; a reason has 200 characters at most."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. It has no network, starts no process or thread, and writes nowhere but in its own folder.

    Attributes:
        seconds: By the clock, the start of Python included.
        cpu_seconds: Of computing.
        memory_bytes: Of address space.
        file_bytes: Of any one file.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 1024**3
    file_bytes: int = 1024**2

    def resources(self) -> dict[str, int]:
        """By the name of the limit in `resource`; no core file, and no further process where the system counts them."""
        return {
            "RLIMIT_CPU": self.cpu_seconds, "RLIMIT_AS": self.memory_bytes, "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NPROC": 1, "RLIMIT_CORE": 0,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a program ended.

    Attributes:
        outcome: ``passed`` (it ran to its end and raised nothing), ``failed`` or ``timed out``.
        reason: What it raised, or which limit ended it; empty where it passed.
        unclosed: What this machine could not keep from it; empty on Linux 5.13 or newer on x86_64 and aarch64.
    """

    outcome: str
    reason: str
    unclosed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.outcome == PASSED


def run(program: str, *, limits: Limits | None = None) -> Verdict:
    """Runs Python source with its tests at its end: it passes when nothing is raised.

    What it prints goes nowhere. It starts with an empty environment in an empty folder that is removed afterwards.

    Args:
        program: Source, run as a module named ``program``, so that a block under ``__name__ == "__main__"`` does not run.
        limits: None takes the defaults.
    """
    limits = limits or Limits()
    request = json.dumps({"program": program, "limits": limits.resources()}).encode()
    with (
        tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as report,
    ):
        # A pipe would keep us waiting for whoever still holds its other end; a file does not, and has a size limit.
        process = subprocess.Popen(
            [sys.executable, "-I", str(JAIL)], stdin=subprocess.PIPE, stdout=report, stderr=subprocess.DEVNULL, cwd=folder, env={},
            start_new_session=True,
        )  # fmt: skip
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
        found = json.loads(report)
    except ValueError:
        return Verdict(FAILED, "ended before its last line", ())
    return Verdict(PASSED if found["passed"] else FAILED, found["reason"], tuple(found["open"]))
