"""What the user reads while a run goes on: one line a fact, the room's name in front."""

import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from typing import TextIO

WIDTH = 110
MARGIN = 11


def log(room: str, *sentences: str, stream: TextIO | None = None) -> None:
    """Prints each sentence after its room's name, wrapped so that the names stay a column of their own."""
    stream = stream or sys.stdout
    for sentence in sentences:
        lines = textwrap.wrap(sentence, WIDTH - MARGIN, break_long_words=False, break_on_hyphens=False) or [""]
        print(f"{room:<{MARGIN}}{lines[0]}", file=stream)
        for line in lines[1:]:
            print(f"{'':<{MARGIN}}{line}", file=stream)
    stream.flush()


def print_error(message: object, code: int) -> int:
    """Prints why the program ends, on the error stream; hands back the exit code."""
    print(f"finetune: {message}", file=sys.stderr, flush=True)
    return code


def table(room: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints aligned columns; all but the first are right-aligned, since they hold figures."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        first, *others = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"{room:<{MARGIN}}{'  '.join([first, *others])}".rstrip())
        room = ""
    sys.stdout.flush()


def quiet_libraries() -> None:
    """Keeps the libraries' deprecations of their own names from users, who cannot act on them."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


def human_bytes(count: float) -> str:
    """``1536`` -> ``1.5 KiB``: binary units, as memory is sold and reported."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable: the last unit always returns")


def change_text(change: Mapping[str, float], *, digits: int = 4) -> str:
    """``+0.0012 [-0.0003, +0.0027]``: a difference with its interval."""
    form = f"+.{digits}f"
    return f"{change['difference']:{form}} [{change['low']:{form}}, {change['high']:{form}}]"
