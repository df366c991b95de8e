"""Writes the output of each process to a file of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from finetune.launch.ranks import Ranks


class Tee:
    """A stream that also writes to a file, without text that redraws a line, such as progress bars."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        if "\r" not in text:
            self.file.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()
        self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def log_to_file(ranks: Ranks, folder: Path) -> None:
    """Writes ``logs/rank-<n>.log``: the first process also prints; the others write to the file only, libraries
    included."""
    if ranks.count == 1:
        return
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    path = folder / "logs" / f"rank-{ranks.rank}.log"
    file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  # open as long as the process runs
    if ranks.is_main:
        sys.stdout, sys.stderr = Tee(sys.stdout, file), Tee(sys.stderr, file)
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file.fileno(), stream.fileno())
