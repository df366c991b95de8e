"""Samples the memory of this process while a stage runs."""

import json
import sys
import threading
import time
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


def free_bytes(device: str) -> int:
    """Returns the free memory of a device such as ``cpu`` or ``cuda:0``."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


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
