"""Runs programs that a model wrote and judges them by their tests, without permissions and with limits."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from finetune.errors import EvalError

JUDGE = Path(__file__).with_name("sandboxed")
PASSED, FAILED, TIMED_OUT, REFUSED = "passed", "failed", "timed out", "refused"
REPORT_BYTES = 4096
"""Bytes read of a report; a reason has 200 characters at most."""

ENTRY_BYTES = 4096
"""What a file or a folder takes on disk apart from its content."""

WATCH_SECONDS = 0.02
"""Time between two looks at how much a program has written."""


ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""numpy starts threads unless this asks for none, and a program may start none."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resources of one program. It has no network, starts no process or thread, and sees no files but its own.

    Attributes:
        seconds: Wall time, the start of Python included.
        cpu_seconds: CPU time.
        memory_bytes: Address space.
        file_bytes: Size of any one file.
        total_bytes: Size of all its files; how much more can be written until it is ended depends on the disk.
        open_files: Files that are open at once; a removed file that is open still takes space.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 1024**3
    file_bytes: int = 1024**2
    total_bytes: int = 16 * 1024**2
    open_files: int = 64

    def resources(self) -> dict[str, int]:
        """Returns the limits by their name in `resource`: also no core file, and no further process of this user."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": 1,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a program ended.

    Attributes:
        outcome: ``passed`` (its tests ran to their end and raised nothing), ``failed`` or ``timed out``.
        reason: What was raised, or which limit ended it; empty if it passed.
    """

    outcome: str
    reason: str

    @property
    def passed(self) -> bool:
        return self.outcome == PASSED


def check_sandbox() -> None:
    """Runs an empty program, so that a machine that cannot restrict programs is refused before any work.

    Raises:
        EvalError: A restriction cannot be enforced; the message has the remedy.
    """
    run_program("", tests="")


def run_program(program: str, *, tests: str, limits: Limits | None = None) -> Verdict:
    """Runs Python source and its tests: it passes if the tests raise nothing.

    The tests run in a process of their own, so that a program can neither write its verdict nor read or change its
    tests. A name that the tests do not define is the program's, but names that Python has (``abs``, ``sum``) are
    Python's; ``from program import sum`` takes the program's. Plain values are copied between the two, also those that
    the program changes in place; functions, classes and other objects stay where they are and are used from there.

    Both start without the user's environment in an empty folder that is removed afterwards; their output is discarded.

    Args:
        program: Source, run as a module named ``program``, so that a block under ``__name__ == "__main__"`` does not
            run.
        tests: Source, run afterwards.
        limits: None means the defaults; the program and the tests each have them.

    Raises:
        EvalError: This machine cannot restrict programs; none was run.
    """
    limits = limits or Limits()
    request = json.dumps({"program": program, "tests": tests, "limits": limits.resources()}).encode()
    with (
        tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as report,
    ):
        # Reading a pipe blocks until every process closes its other end. A file does not block, and has a size limit.
        process = subprocess.Popen(
            [sys.executable, "-I", str(JUDGE)],
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(request)
            stopped = _watch(process, Path(folder), limits)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return stopped or _verdict(report, process.returncode, limits)


def _watch(process: subprocess.Popen[bytes], folder: Path, limits: Limits) -> Verdict | None:
    """Waits for the end of the process; returns a verdict if a limit comes first."""
    deadline = time.monotonic() + limits.seconds
    while True:
        try:
            process.wait(timeout=WATCH_SECONDS)
            return None
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                return Verdict(TIMED_OUT, f"ran for more than {limits.seconds:g} s")
            if _size(folder, limits.total_bytes) > limits.total_bytes:
                return Verdict(FAILED, f"wrote more than {limits.total_bytes / 1024**2:g} MiB")


def _size(folder: Path, limit: int) -> int:
    """Returns the bytes that a folder takes, or more than the limit as soon as that is certain."""
    size, pending = 0, [os.fspath(folder)]
    while pending and size <= limit:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # removed meanwhile
                    size += ENTRY_BYTES + entry.stat(follow_symlinks=False).st_size
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                if size > limit:
                    break
    return size


def _verdict(report: IO[bytes], code: int, limits: Limits) -> Verdict:
    if code == -signal.SIGXCPU:
        return Verdict(TIMED_OUT, f"computed for more than {limits.cpu_seconds} s")
    if code < 0:
        return Verdict(FAILED, f"ended by {signal.Signals(-code).name}")
    report.seek(0)
    try:
        result = json.loads(report.read(REPORT_BYTES))
    except ValueError:
        return Verdict(FAILED, f"its tests ended with exit code {code} and without a report")
    if code != 0:
        return Verdict(FAILED, f"its tests ended with exit code {code}")
    if result["outcome"] == REFUSED:
        raise EvalError(f"programs that a model wrote are not run on this machine: {result['reason']}")
    if result["outcome"] == TIMED_OUT:
        return Verdict(TIMED_OUT, f"computed for more than {limits.cpu_seconds} s")
    return Verdict(result["outcome"], result["reason"])
