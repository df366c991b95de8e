"""Runs one untrusted program in the process that `finetune.eval.sandbox` started: drops permissions, then runs it.

It is run by its path under ``python -I`` and imports nothing of this package.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types
from typing import Any

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
"""System calls, the same on every architecture. Source: the kernel's userspace-api/landlock.rst."""

WRITES = sum(1 << bit for bit in (1, *range(4, 13)))
"""Landlock's rights to write, remove and create; 13 (move) came with its version 2, 14 (truncate) with 3."""

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""AUDIT_ARCH of each, and its column below. Source: linux/audit.h."""

FORBIDDEN = {
    "socket": (41, 198), "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "process_vm_writev": (311, 271),
    "io_uring_setup": (425, 425), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "shmget": (29, 194),
}  # fmt: skip
"""System calls that start programs, threads or connections, affect other processes, or outlive the program, with
their numbers on both architectures. Source: the kernel's syscall tables."""


def main() -> None:
    """Reads ``{"program", "limits"}`` from stdin and writes ``{"passed", "reason", "unenforced"}`` to stdout."""
    request = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    unenforced = restrict(request["limits"])
    reason = run(request["program"])
    os.write(report, json.dumps({"passed": not reason, "reason": reason, "unenforced": unenforced}).encode())
    os._exit(0)  # skips exit handlers that the program registered


def run(program: str) -> str:
    """Runs the program and returns why it failed; an empty string if it ran to its end."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001 - whatever a program raises, SystemExit too, is its failure
        return f"{type(error).__name__}: {error}".removesuffix(": ")[:200]
    return ""


def restrict(limits: dict[str, int]) -> list[str]:
    """Restricts this process. Returns the restrictions that this machine could not enforce."""
    unenforced = [name for name, number in limits.items() if not _limit(getattr(resource, name), number)]
    libc = ctypes.CDLL(None, use_errno=True)
    # 38 is PR_SET_NO_NEW_PRIVS, which both of the following require.
    if sys.platform != "linux" or libc.prctl(38, 1, 0, 0, 0) != 0:
        return [*unenforced, "files of this user", "network, processes and threads"]
    if not _landlock(libc):
        unenforced.append("files of this user")
    if not _seccomp(libc):
        unenforced.append("network, processes and threads")
    return unenforced


def _limit(kind: int, number: int) -> bool:
    """Sets a resource limit. The hard limit on CPU time is a second longer: the soft one has a signal of its own."""
    highest = resource.getrlimit(kind)[1]
    hard = number + (kind == resource.RLIMIT_CPU)
    hard = hard if highest == resource.RLIM_INFINITY else min(hard, highest)
    try:
        resource.setrlimit(kind, (min(number, hard), hard))
    except (ValueError, OSError):
        return False
    return True


def _landlock(libc: Any) -> bool:
    """Forbids writing outside the working directory."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    rights = WRITES | (version >= 2) << 13 | (version >= 3) << 14
    handled = struct.pack("Q", rights)
    rules = libc.syscall(LANDLOCK_CREATE, handled, len(handled), 0)
    here = os.open(".", os.O_PATH)
    allowed = struct.pack("=Qi", rights, here)
    return bool(
        rules >= 0
        and libc.syscall(LANDLOCK_ADD, rules, 1, allowed, 0) == 0
        and libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0
    )


def _seccomp(libc: Any) -> bool:
    """Makes the forbidden system calls fail with EPERM."""
    architecture, column = ARCHITECTURES.get(platform.machine(), (0, 0))
    if not architecture:
        return False
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    refuse, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000  # SECCOMP_RET_ERRNO | EPERM, _ALLOW, _KILL_PROCESS
    numbers = [number for pair in FORBIDDEN.values() if (number := pair[column]) is not None]
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # the second numbering of x86_64
    for number in numbers:
        steps += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    code = b"".join(struct.pack("HBBI", *step) for step in [*steps, (answer, 0, 0, allow)])
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    return bool(libc.prctl(22, 2, program, 0, 0) == 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    main()
