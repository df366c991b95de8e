"""A program that a model wrote can pass, fail or run out of time, and do nothing else."""

import sys
import time
from pathlib import Path

import pytest

from finetune.eval.sandbox import Limits, Verdict, run_program

WHERE_LINUX_HELPS = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")

PASSING = {
    "tests that hold": "def f(x): return x + 1\nassert f(1) == 2",
    "a dataclass with annotations as text": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\nassert A(1).x == 1"
    ),
    "a main block, which does not run": "if __name__ == '__main__':\n    raise ValueError",
    "a file of its own": "open('own', 'w').write('x')\nassert open('own').read() == 'x'",
    "talk": "import sys\nprint('x' * 10_000_000)\nsys.stderr.write('y' * 10_000_000)",
    "work left for the end": "import atexit, time\natexit.register(time.sleep, 60)",
}
FAILING = {
    "assert 1 == 2": "AssertionError",
    "def f(:": "SyntaxError",
    "import sys\nsys.exit(0)": "SystemExit: 0",
    "import os\nos._exit(0)": "ended before its last line",
    "x = bytearray(3 * 1024**3)": "MemoryError",
    "open('big', 'w').write('x' * 3_000_000)": "File too large",
    "input()": "EOFError",
    "import ctypes\nctypes.string_at(0)": "SIGSEGV",
    "def f(): f()\nf()": "RecursionError",
    "raise ValueError('x' * 10_000)": "ValueError: xxx",
}
KEPT_FROM = {
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "a child": "import os\nos.fork()",
    "another program": "import subprocess\nsubprocess.run(['true'])",
    "a thread": "import threading\nthreading.Thread(target=print).start()",
    "signals to others": "import os\nos.kill(os.getppid(), 9)",
    "the rights of files": "import os\nos.chmod('/tmp', 0o777)",
}


@pytest.mark.parametrize("program", PASSING.values(), ids=PASSING)
def test_program_passes_with(program: str) -> None:
    verdict = run_program(program)
    assert verdict.passed, verdict
    assert not verdict.reason


@pytest.mark.parametrize(("program", "reason"), FAILING.items())
def test_program_fails_with_its_reason(program: str, reason: str) -> None:
    verdict = run_program(program)
    assert verdict.outcome == "failed"
    assert reason in verdict.reason
    assert len(verdict.reason) <= 200


@WHERE_LINUX_HELPS
@pytest.mark.parametrize("program", KEPT_FROM.values(), ids=KEPT_FROM)
def test_program_is_kept_from(program: str) -> None:
    verdict = run_program(program)
    assert verdict.outcome == "failed"
    assert "Operation not permitted" in verdict.reason or "can't start new thread" in verdict.reason


@WHERE_LINUX_HELPS
def test_nothing_outside_is_written_or_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for program in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.truncate({str(kept)!r}, 0)",
    ):
        assert "Permission denied" in run_program(program).reason
    assert kept.read_text() == "mine"


def test_endless_computing_ends_at_the_limit() -> None:
    assert run_program("while True: pass", limits=Limits(seconds=120, cpu_seconds=1)) == Verdict(
        "timed out", "computed for more than 1 s", ()
    )


def test_endless_waiting_ends_at_the_limit() -> None:
    started = time.monotonic()
    assert run_program("import time\ntime.sleep(60)", limits=Limits(seconds=2)) == Verdict(
        "timed out", "ran for more than 2 s", ()
    )
    assert time.monotonic() - started < 30


def test_program_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert run_program("import os\nassert not os.environ.keys() - {'LC_CTYPE', '__CF_USER_TEXT_ENCODING'}").passed


def test_program_cannot_import_what_lies_beside_us() -> None:
    assert (
        "No module named" in run_program("import finetune.eval.sandbox_child").reason
        or "No module named" in run_program("import sandbox_child").reason
    )
