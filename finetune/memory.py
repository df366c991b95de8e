"""Measures the memory of this process and what is free, and recognizes errors of allocators."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

SAMPLE_SECONDS = 0.25


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
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            yield from _free_of_group(controllers, path.lstrip("/"))


def _free_of_group(controllers: str, path: str) -> Iterator[int]:
    """Yields what a control group's limit leaves, without the file pages that the system would drop.

    Source: the kernel's Documentation/admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    root = Path("/sys/fs/cgroup") / controllers
    limit, current, inactive = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if controllers
        else ("memory.max", "memory.current", "inactive_file")
    )
    for folder in dict.fromkeys([root / path, root]):  # in a container the group's own folder is the root
        try:
            most = (folder / limit).read_text(encoding="utf-8").strip()
            lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            used = int((folder / current).read_text(encoding="utf-8"))
        except OSError:
            continue
        if most.isdigit():
            yield int(most) - used + int(dict(line.split() for line in lines).get(inactive, 0))


class PeakMemory:
    """Samples memory in a thread and appends ``{"time", "stage", "rss_bytes", "device_bytes"}`` lines to a file.

    Attributes:
        rss_bytes: Highest resident memory seen so far.
        device_bytes: Highest memory reserved on the GPU seen so far.
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
            self._sample()

    def _sample(self) -> None:
        rss, device = rss_bytes(), device_bytes()
        self.rss_bytes = max(self.rss_bytes, rss)
        self.device_bytes = max(self.device_bytes, device)
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
