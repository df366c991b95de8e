"""Runs a command under a memory cap and samples what it and its children hold."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

CGROUPS = (
    (Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")),
    (Path("/sys/fs/cgroup"), ("memory.max",)),
)
"""Where versions 1 and 2 keep memory groups, and the files that take a limit, to be set in this order."""

SAMPLE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory of a process and its children at a moment.

    Attributes:
        time: Seconds since 1970.
        anonymous_bytes: Allocated memory, which no file backs and the kernel cannot drop.
        rss_bytes: All resident memory; it includes mapped files, whose pages the kernel drops when others need them.
    """

    time: float
    anonymous_bytes: int
    rss_bytes: int


@dataclass(kw_only=True)
class CappedResult:
    """How a command ended.

    Attributes:
        code: Exit code; negative after a signal.
        capped_by: ``cgroup`` where the kernel held all memory of the processes within the cap, file pages included;
            ``samples`` where a cgroup cannot be made here, and the command is killed at the first sample whose
            anonymous memory is above the cap.
        is_over: Whether it was ended because of the cap.
        samples: In the order of time.
    """

    code: int
    capped_by: str
    is_over: bool
    samples: list[Sample] = field(repr=False)

    @property
    def peak_rss_bytes(self) -> int:
        return max((sample.rss_bytes for sample in self.samples), default=0)

    @property
    def peak_anonymous_bytes(self) -> int:
        return max((sample.anonymous_bytes for sample in self.samples), default=0)


def run_capped(command: Sequence[str], *, cap_bytes: int, environment: Mapping[str, str], folder: Path) -> CappedResult:
    """Runs a command in a folder, with its output on this terminal, and ends it where it needs more than the cap."""
    with memory_group(cap_bytes) as group:
        if group is not None:
            command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
        process = psutil.Popen(command, env=dict(environment), cwd=folder)
        sampler = _Sampler(process, cap_bytes=None if group else cap_bytes)
        sampler.start()
        try:
            code = process.wait()
        finally:
            kill_tree(process)
        sampler.join()
        is_over = sampler.is_over or (group is not None and _oom_kills(group) > 0)
    return CappedResult(code=code, capped_by="cgroup" if group else "samples", is_over=is_over, samples=sampler.samples)


@contextlib.contextmanager
def memory_group(cap_bytes: int) -> Iterator[Path | None]:
    """Yields a new cgroup with a memory limit; None where this user may not make one."""
    group = _make_group(cap_bytes)
    try:
        yield group
    finally:
        if group is not None:
            _remove(group)


def _make_group(cap_bytes: int) -> Path | None:
    for root, limits in CGROUPS:
        group = root / f"finetune-walk-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limits[0]).write_text(str(cap_bytes))
        except OSError:  # the memory controller is not handed to this place
            group.rmdir()
            continue
        for further in limits[1:]:  # no swap beyond the cap; the kernel may have no swap to limit
            with contextlib.suppress(OSError):
                (group / further).write_text(str(cap_bytes))
        return group
    return None


def _remove(group: Path) -> None:
    """Removes a group; its last process may take a moment to leave it."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(SAMPLE_SECONDS)


def _oom_kills(group: Path) -> int:
    """Counts the processes that the kernel killed for memory in a group."""
    for name in ("memory.oom_control", "memory.events"):
        with contextlib.suppress(OSError):
            counts = dict(line.split() for line in (group / name).read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0


def kill_tree(process: psutil.Process) -> None:
    """Kills a process and the children that it left."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def measure(process: psutil.Process) -> Sample:
    """Adds up what a process and its children hold. Source: proc_pid_status(5)."""
    sizes = {"RssAnon": 0, "RssShmem": 0, "RssFile": 0}
    processes: list[psutil.Process] = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        processes += process.children(recursive=True)
    for one in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{one.pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in sizes:
                    sizes[name] += int(value.split()[0]) * 1024
    anonymous = sizes["RssAnon"] + sizes["RssShmem"]
    return Sample(time=time.time(), anonymous_bytes=anonymous, rss_bytes=anonymous + sizes["RssFile"])


class _Sampler(threading.Thread):
    def __init__(self, process: psutil.Process, *, cap_bytes: int | None) -> None:
        super().__init__(daemon=True)
        self.process, self.cap_bytes = process, cap_bytes
        self.samples: list[Sample] = []
        self.is_over = False

    def run(self) -> None:
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            sample = measure(self.process)
            self.samples.append(sample)
            if self.cap_bytes is not None and sample.anonymous_bytes > self.cap_bytes:
                self.is_over = True
                kill_tree(self.process)
                return
            time.sleep(SAMPLE_SECONDS)
