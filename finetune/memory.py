"""Measures the memory of this process and what is free, and recognizes errors of allocators."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

SAMPLE_SECONDS = 0.25
UNLIMITED_BYTES = 2**62
"""Version 1 of control groups has no word for no limit: it writes the largest number of pages, almost 2**63 bytes."""


def rss_bytes() -> int:
    """Returns the resident memory of this process, in bytes. Source: psutil."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def device_bytes() -> int:
    """Returns the memory that torch reserved on the current GPU, in bytes; 0 where torch or a GPU is not in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_reserved())


def peak_device_bytes() -> int:
    """Returns the most that torch has reserved on the current GPU since `reset_peak_device_bytes`; 0 without one."""
    return int(sys.modules["torch"].cuda.max_memory_reserved()) if device_bytes() else 0


def reset_peak_device_bytes() -> None:
    """Starts a new peak at what is reserved now."""
    if device_bytes():
        sys.modules["torch"].cuda.reset_peak_memory_stats()


OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Messages of torch errors that have no class of their own: a CPU's allocator, cuBLAS. Source: torch's
c10/core/impl/alloc_cpu.cpp."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that there is not enough memory, on a GPU or a CPU."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text.lower() in str(error).lower() for text in OUT_OF_MEMORY)


def free_bytes(device: str) -> int:
    """Returns the free memory of a device such as ``cpu`` or ``cuda:0``.

    On a CPU the limits of this process count too: those of its control group, and of ``ulimit``.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_free_of_limits()]))


def _free_of_limits() -> Iterator[int]:
    """Yields what each limit of this process leaves. Linux only; elsewhere there is none."""
    import psutil

    if sys.platform != "linux":
        return
    import resource

    used = psutil.Process().memory_info()
    for limit, bytes_used in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, used.data)):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            yield soft - bytes_used
    if (group := memory_group()) is not None:
        yield group.limit_bytes - group.used_bytes


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """The control group that bounds this process's memory: a container's, a batch system's or a service's.

    Attributes:
        limit_bytes: The smallest limit of the group and of those above it.
        used_bytes: What its processes use, without file pages, which the kernel drops when memory is short.
    """

    limit_bytes: int
    used_bytes: int


def memory_group(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> MemoryGroup | None:
    """Returns the memory group of this process; None where nothing bounds it, or the system has no control groups.

    Source: the kernel's Documentation/admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        lines = [line.split(":", 2) for line in process.read_text(encoding="utf-8").splitlines()]
        for _, controllers, path in lines:
            if "memory" in controllers.split(","):
                return _version_1(_existing(root / "memory", path))
        path = next(path for _, controllers, path in lines if not controllers)
        return _version_2(_existing(root, path), root)
    except (OSError, StopIteration):
        return None


def _existing(root: Path, path: str) -> Path:
    """Returns a group's folder; a container sees its own group as the root, under a path that names the host's."""
    folder = root / path.lstrip("/")
    return folder if folder.is_dir() else root


def _version_1(group: Path) -> MemoryGroup | None:
    counts = _counts(group / "memory.stat")
    limit = counts["hierarchical_memory_limit"]
    return None if limit >= UNLIMITED_BYTES else MemoryGroup(limit, counts["total_rss"])


def _version_2(group: Path, root: Path) -> MemoryGroup | None:
    bounded = [
        (int(text), folder)
        for folder in (group, *group.parents)
        if folder.is_relative_to(root)
        and (folder / "memory.max").is_file()
        and (text := (folder / "memory.max").read_text(encoding="utf-8").strip()).isdigit()
    ]
    if not bounded:
        return None
    limit, folder = min(bounded)
    counts = _counts(folder / "memory.stat")
    files = counts["inactive_file"] + counts["active_file"]
    return MemoryGroup(limit, int((folder / "memory.current").read_text(encoding="utf-8")) - files)


def _counts(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in map(str.split, file.read_text(encoding="utf-8").splitlines())}


class PeakMemory:
    """Samples memory in a thread and appends ``{"time", "stage", "rss_bytes", "device_bytes"}`` lines to a file.

    Attributes:
        rss_bytes: Highest resident memory seen so far.
        device_bytes: Highest memory reserved on the GPU so far, as torch's allocator counts it.
    """

    def __init__(self, file: Path, *, stage: str) -> None:
        self.file = file
        self.stage = stage
        self.rss_bytes = 0
        self.device_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> "PeakMemory":
        drop_partial_line(self.file)
        reset_peak_device_bytes()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            with suppress(OSError):  # the disk is full: what the stage writes next says so
                self._sample()

    def _sample(self) -> None:
        rss, device = rss_bytes(), device_bytes()
        self.rss_bytes = max(self.rss_bytes, rss)
        self.device_bytes = max(self.device_bytes, device, peak_device_bytes())
        line = {"time": round(time.time(), 2), "stage": self.stage, "rss_bytes": rss, "device_bytes": device}
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")


def drop_partial_line(file: Path) -> None:
    """Removes a last line that a killed process did not finish, so that the next one starts on a line of its own."""
    if not file.is_file():
        return
    content = file.read_bytes()
    if not content.endswith(b"\n"):
        file.write_bytes(content[: content.rfind(b"\n") + 1])
