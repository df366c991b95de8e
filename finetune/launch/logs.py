"""What each process of a launch says, in a file of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from finetune.launch.ranks import Ranks


class Tee:
    """A stream that also writes into a file; what only redraws a line, a progress bar, stays out of it."""

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
    """Writes ``logs/rank-<n>.log``: the first process also to the console, the others to the file alone, libraries included."""
    if ranks.count == 1:
        return
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    file = open(folder / "logs" / f"rank-{ranks.rank}.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  # as long as the process
    if ranks.is_main:
        sys.stdout, sys.stderr = Tee(sys.stdout, file), Tee(sys.stderr, file)
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file.fileno(), stream.fileno())
