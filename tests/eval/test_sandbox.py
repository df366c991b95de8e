"""A program that a model wrote can pass, fail or run out of time, and do nothing else."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from finetune.errors import EvalError
from finetune.eval import sandbox
from finetune.eval.sandbox import Limits, Verdict, check_sandbox, run_program

FORGE = """
import os
for fd in range(3, 64):
    for line in (b'{"passed": true, "outcome": "passed", "reason": ""}', b'["value", null, [[], {}], ""]\\n' * 9):
        try: os.write(fd, line)
        except OSError: pass
os._exit(0)
"""
"""Writes every report that might be believed into every descriptor, and ends."""

CALL = (
    "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.syscall({}, {}) == -1: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))"
)
"""A system call by its number on x86_64."""

PASSING = {
    "tests that hold": ("def f(x): return x + 1", "assert f(1) == 2"),
    "a dataclass with annotations as text": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int",
        "assert A(1).x == 1 and A(1) == A(1) and A(1) != A(2) and isinstance(A(1), A)",
    ),
    "a main block, which does not run": ("if __name__ == '__main__':\n    raise ValueError", ""),
    "a file of its own": ("open('own', 'w').write('x')\nassert open('own').read() == 'x'", ""),
    "much output": ("import sys\nprint('x' * 10_000_000)\nsys.stderr.write('y' * 10_000_000)", ""),
    "work left for the end": ("import atexit, time\natexit.register(time.sleep, 60)", ""),
    "arguments changed in place": (
        "def f(x, y):\n    x.sort()\n    y['a'].append(1)\n    return x",
        "x, y, inner = [3, 1], {'a': []}, []\ny['a'] = inner\nf(x, y)\nassert x == [1, 3] and inner == [1]",
    ),
    "every kind of plain value": (
        "def f(x): return x",
        "from decimal import Decimal\nfrom fractions import Fraction\nimport datetime\n"
        "for x in (None, True, 10**5000, 0.1, float('inf'), 1j, 'a\\ud800', b'a', [1, (2,)], {1: {2}}, frozenset({1}),"
        " range(3), Decimal('0.1'), Fraction(1, 3), datetime.date(2020, 1, 1), datetime.timedelta(1)):\n"
        "    assert f(x) == x and type(f(x)) is type(x), x\n"
        "assert f(float('nan')) != f(float('nan'))",
    ),
    "values of derived classes": (
        "from collections import Counter, namedtuple\nfrom enum import IntEnum\nP = namedtuple('P', 'x y')\n"
        "class E(IntEnum):\n    a = 1\ndef f(): return Counter('aab'), P(1, 2), E.a",
        "assert f() == ({'a': 2, 'b': 1}, (1, 2), 1)",
    ),
    "functions in both directions": (
        "def f(g, x): return sorted(x, key=g)\ndef add(n): return lambda x: x + n",
        "assert f(lambda x: -x, [1, 3, 2]) == [3, 2, 1] and add(2)(3) == 5 and f(abs, [-2, 1]) == [1, -2]",
    ),
    "a class": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def __len__(self): return len(self.items)\n    def __getitem__(self, i): return self.items[i]\n"
        "    def __add__(self, other):\n        s = Stack()\n        s.items = self.items + other.items\n"
        "        return s\n    def __repr__(self): return f'Stack{self.items}'",
        "s = Stack()\ns.push(3)\ns.limit = 4\nassert len(s) == 1 and s[0] == 3 and list(s) == [3] and 3 in s\n"
        "assert s.items == [3] and s.limit == 4 and str(s + s) == 'Stack[3, 3]'",
    ),
    "generators and coroutines": (
        "def g():\n    yield 1\n    yield 2\nasync def a(): return 3",
        "import asyncio\nassert list(g()) == [1, 2] and next(g()) == 1 and asyncio.run(a()) == 3",
    ),
    "its own exceptions": (
        "class Empty(ValueError): pass\ndef f(x):\n    if not x: raise Empty('nothing', x)\n    return x[5]",
        "for kind in (Empty, ValueError):\n    try: f('')\n"
        "    except kind as error: assert error.args[0] == 'nothing'\n"
        "    else: assert False\ntry: f('a')\nexcept IndexError: pass",
    ),
    "text that it prints": (
        "def f(): print('hello')",
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out: f()\n"
        "assert out.getvalue() == 'hello\\n'",
    ),
    "modules that it imports": (
        "import math\nimport numpy as np",
        "assert math.floor(1.5) == 1 and np.sum([1, 2]) == 3",
    ),
    "arrays": ("import numpy\ndef f(): return numpy.arange(3)", "assert f().tolist() == [0, 1, 2]"),
    "a function named like Python's": ("def sum(a, b): return a + b", "from program import sum\nassert sum(1, 2) == 3"),
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
FORGED = {
    "reports into every descriptor": FORGE,
    "reports during a test": f"def f(x):\n    exec({FORGE!r})",
    "a replaced os.write": "import os\ndef write(fd, data): return 0\nos.write = write\ndef f(x): os._exit(0)",
    "an exit during a test": "import os\ndef f(x): os._exit(0)",
    "the frames of the tests": (
        "import gc, sys\ndef f(x):\n    frame, seen = sys._getframe(), str(gc.get_objects())\n    while frame:\n"
        "        seen += str(frame.f_code.co_consts) + str(frame.f_locals)\n        frame = frame.f_back\n"
        "    return 5 if 'quokka'.upper() in seen else 0"
    ),
    "a value equal to all": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "a value near to all": (
        "class A(float):\n    def __sub__(self, other): return 0.0\n    __rsub__ = __sub__\n"
        "    def __eq__(self, other): return True\ndef f(x): return A(0)"
    ),
    "a value whose comparisons lie": (
        "class A:\n    def __sub__(self, other): return 0.0\n    def __lt__(self, other): return True\n"
        "def f(x): return A()"
    ),
    "replaced builtins": (
        "import builtins\ndef abs(x): return 0\nbuiltins.abs = abs\nbuiltins.AssertionError = Exception\n"
        "def f(x): return 0"
    ),
    "another function in place of the tests": "def check(f): pass\ndef f(x): return 0",
    "an answer before the question": "import __main__, sys\ndef f(x): __main__._status = lambda *a: 0\nf(0)",
    "arguments changed to fit": "def f(x):\n    x[0] = 0\n    return 0",
}
TESTS = "def check(f):\n    x = [3]\n    assert abs(f(x) - 5) < 1e-6 and f(x) == 5, 'QUOKKA'\ncheck(f)\n"
KEPT_FROM = {
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "a child": "import os\nos.fork()",
    "another program": "import subprocess\nsubprocess.run(['true'])",
    "a thread": "import threading\nthreading.Thread(target=print).start()",
    "signals to others": "import os\nos.kill(os.getppid(), 9)",
    "queued signals to others": CALL.format(129, "os.getppid(), 9, bytes(128)"),
    "queued signals to a thread": CALL.format(297, "os.getppid(), os.getppid(), 9, bytes(128)"),
    "limits of others": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "signals of files to others": "import fcntl, os\nfcntl.fcntl(os.open('a', 66), 8, os.getppid())",
    "signals on input": "import fcntl, os\nfcntl.fcntl(os.open('a', 66), 4, 0o20000)",
    "priorities of others": "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "processors of others": "import os\nos.sched_setaffinity(os.getppid(), {0})",
    "the rights of files": "import os\nos.chmod('/tmp', 0o777)",
    "the times of files": "import os\nos.utime('/tmp')",
    "the attributes of files": "import os\nos.setxattr('/tmp', 'user.a', b'')",
    "queues that stay": CALL.format(68, "0, 0o1666"),
    "semaphores that stay": CALL.format(64, "0, 1, 0o1666"),
    "keys": CALL.format(248, "b'user', b'a', b'b', 1, -3"),
    "namespaces": CALL.format(272, "0x10000000"),
    "counters of the processor": CALL.format(298, "bytes(128), 0, -1, -1, 0"),
    "the host's name": "import socket\nsocket.sethostname('a')",
    "another root": "import os\nos.chroot('.')",
    "datagrams to other sockets": "import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)",
    "memory that is a file": "import os\nos.memfd_create('a')",
}
READS = (
    "open('/etc/passwd')", "open('/proc/self/environ')", "open(f'/proc/{__import__(\"os\").getppid()}/environ')",
    "open('/proc/self/mem')", "__import__('os').listdir('/')", "__import__('os').listdir('/proc')",
    "__import__('os').listdir('..')", "open(SECRET)", "__import__('os').link(SECRET, 'a')",
    "__import__('os').symlink(SECRET, 'b') or open('b')",
)  # fmt: skip


@pytest.mark.parametrize(("program", "tests"), PASSING.values(), ids=PASSING)
def test_program_passes_with(program: str, tests: str) -> None:
    verdict = run_program(program, tests=tests)
    assert verdict.passed, verdict
    assert not verdict.reason


@pytest.mark.parametrize(("program", "reason"), FAILING.items())
def test_program_fails_with_its_reason(program: str, reason: str) -> None:
    verdict = run_program(program, tests="")
    assert verdict.outcome == "failed"
    assert reason in verdict.reason
    assert len(verdict.reason) <= 200


@pytest.mark.parametrize("program", FORGED.values(), ids=FORGED)
def test_program_cannot_forge_its_verdict_by(program: str) -> None:
    assert run_program(program, tests=TESTS).outcome == "failed"


@pytest.mark.parametrize("program", KEPT_FROM.values(), ids=KEPT_FROM)
def test_program_is_kept_from(program: str) -> None:
    verdict = run_program(program, tests="")
    assert verdict.outcome == "failed"
    assert "Operation not permitted" in verdict.reason or "can't start new thread" in verdict.reason


def test_nothing_outside_is_written_or_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for program in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.truncate({str(kept)!r}, 0)",
    ):
        assert "Permission denied" in run_program(program, tests="").reason
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("expression", READS)
def test_nothing_outside_is_read(expression: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hf_x")
    verdict = run_program(expression.replace("SECRET", repr(str(tmp_path / "secret"))), tests="")
    assert verdict.outcome == "failed"
    assert "Permission denied" in verdict.reason or "cross-device" in verdict.reason


def test_program_of_an_evaluation_by_root_is_another_user() -> None:
    assert run_program("import os\ndef f(): return os.getuid()", tests="assert f() != 0").passed


def test_all_that_is_written_is_limited() -> None:
    program = "for number in range(10_000): open(str(number), 'w').write('x' * 2**19)"
    assert run_program(program, tests="") == Verdict("failed", "wrote more than 16 MiB")
    program = "import os\nfor number in range(10**7): os.mkdir(str(number))"
    assert run_program(program, tests="") == Verdict("failed", "wrote more than 16 MiB")


def test_endless_computing_ends_at_the_limit() -> None:
    limits, computed = Limits(seconds=120, cpu_seconds=1), Verdict("timed out", "computed for more than 1 s")
    assert run_program("while True: pass", tests="", limits=limits) == computed
    assert run_program("", tests="while True: pass", limits=limits) == computed


def test_endless_waiting_ends_at_the_limit() -> None:
    started = time.monotonic()
    assert run_program("import time\ntime.sleep(60)", tests="", limits=Limits(seconds=2)) == Verdict(
        "timed out", "ran for more than 2 s"
    )
    assert time.monotonic() - started < 30


def test_no_process_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = tmp_path / "judge"  # other tests run programs at the same time: this one's have a name of their own
    judge.symlink_to(sandbox.JUDGE)
    monkeypatch.setattr(sandbox, "JUDGE", judge)
    program = partial(run_program, "import time\ndef f(): time.sleep(60)", tests="f()", limits=Limits(seconds=4))
    with ThreadPoolExecutor() as threads:
        verdict = threads.submit(program)
        most = 0
        while not verdict.done():
            most = max(most, processes_with(str(judge)))
            time.sleep(0.05)
    assert verdict.result().outcome == "timed out"
    assert most == 2, "the program and its judge"
    deadline = time.monotonic() + 10  # a killed process takes its time on a busy machine
    while processes_with(str(judge)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(str(judge)) == 0


def processes_with(argument: str) -> int:
    """Counts the processes of this machine that have this on their command line."""
    count = 0
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            count += argument.encode() in line.read_bytes()
    return count


def test_program_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    known = {"LC_CTYPE", *sandbox.ENVIRONMENT}
    program = f"import os\nassert os.environ.keys() <= {known}"
    assert run_program(program, tests="").passed


@pytest.mark.parametrize("module", ["finetune.eval.sandbox", "__main__.values", "restrictions"])
def test_program_cannot_import_what_lies_next_to_us(module: str) -> None:
    reason = run_program(f"import {module}", tests="").reason
    assert "No module named" in reason or "Permission denied" in reason


def test_machine_that_cannot_restrict_programs_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its packages, a program would have everything that this user has."""
    folder = tmp_path / "sandboxed"
    folder.mkdir()
    for file in sandbox.JUDGE.glob("*.py"):
        (folder / file.name).write_text(file.read_text().replace("import landlock", "import landlock_missing"))
    monkeypatch.setattr(sandbox, "JUDGE", folder)
    with pytest.raises(EvalError, match=r"not run on this machine: .*landlock_missing.*install the packages landlock"):
        check_sandbox()
