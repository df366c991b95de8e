"""What the user reads while a run works: messages, tables and progress bars.

Colours and bars appear on a terminal only (``NO_COLOR`` turns colours off); a file or pipe gets plain text.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

WIDTH = 110
MARGIN = 11
PLAIN_SECONDS = 60.0
"""Where there is no terminal, progress is a line of text, at most this often."""


END = "report"
"""The package that prints the end of a run."""

_is_quiet = False


def be_quiet(is_quiet: bool = True) -> None:
    """Leaves out what a run prints before its end; its folder and its report have it. Errors are printed."""
    global _is_quiet
    _is_quiet = is_quiet


def log(package: str, *sentences: str, stream: TextIO | None = None, style: str = "") -> None:
    """Prints each sentence after its package's name, wrapped so that the names form a column of their own.

    Args:
        package: The name.
        sentences: What to print.
        stream: Where; standard output by default.
        style: rich's style of the sentences on a terminal, e.g. ``bold green``.
    """
    stream = stream or sys.stdout
    if _is_quiet and package != END:
        return
    for sentence in sentences:
        lines = textwrap.wrap(sentence, _width(stream) - MARGIN, break_long_words=False, break_on_hyphens=False) or [""]
        names = [_styled(f"{package:<{MARGIN - 1}} ", "cyan", stream), *[" " * MARGIN] * (len(lines) - 1)]
        for name, line in zip(names, lines, strict=True):
            print(f"{name}{_styled(line, style, stream) if style else line}", file=stream)
    stream.flush()


def print_error(message: object, exit_code: int) -> int:
    """Prints why the program ends, on the error stream, and returns the exit code."""
    print(f"{_styled('finetune:', 'bold red', sys.stderr)} {message}", file=sys.stderr, flush=True)
    return exit_code


def table(package: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints aligned columns; all but the first are right-aligned, since they hold figures."""
    if _is_quiet and package != END:
        return
    cells = [list(header), *[list(row) for row in rows]]
    lines = _drawn(cells) if sys.stdout.isatty() else _aligned(cells)
    for line in lines:
        print(f"{_styled(f'{package:<{MARGIN}}', 'cyan', sys.stdout)}{line}".rstrip())
        package = ""
    sys.stdout.flush()


class ProgressBar:
    """The progress of one task: a bar on a terminal's error stream, elsewhere a line of text now and then.

    Bars that are open at the same time share one display, and messages are printed above it. Processes of a launch
    print lines, which their log files keep.
    """

    display: ClassVar[Progress | None] = None
    open_bars: ClassVar[int] = 0

    def __init__(
        self, label: str, *, total: int | None = None, unit: str = "", done: int = 0, is_shown: bool = True
    ) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.is_shown = is_shown and not _is_quiet
        self.printed = time.monotonic()
        self.task: TaskID | None = None
        if self.is_shown and sys.stderr.isatty() and os.environ.get("WORLD_SIZE", "1") == "1":
            self.task = _open_display().add_task(label, total=total, completed=done, unit=unit, note="")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, steps: int = 1) -> None:
        """Moves the bar by some steps."""
        self.move_to(self.done + steps)

    def move_to(self, done: int, *, note: str = "") -> None:
        """Moves the bar to a number of steps, with a note behind it."""
        self.done = done
        if self.task is not None and ProgressBar.display is not None:
            ProgressBar.display.update(self.task, completed=done, note=note)
        elif self.is_shown and time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            of_total = f" of {self.total:,.0f}" if self.total else ""
            log(self.label, f"{done:,.0f}{of_total} {self.unit}{f', {note}' if note else ''}", stream=sys.stderr)

    def close(self) -> None:
        """Removes the bar; the last one closes the display."""
        if self.task is None or ProgressBar.display is None:
            return
        ProgressBar.display.remove_task(self.task)
        self.task = None
        ProgressBar.open_bars -= 1
        if not ProgressBar.open_bars:
            ProgressBar.display.stop()
            ProgressBar.display = None


def quiet_libraries() -> None:
    """Silences the libraries' progress bars, and the warnings about their own names, which users cannot act on.

    Bars of downloads stay. transformers and datasets ask the hub's library, or the environment, when they are imported.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        return
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
    disable_progress_bars()
    enable_progress_bars("huggingface_hub")


def human_bytes(count: float) -> str:
    """Writes a size in binary units, as memory is sold and reported: ``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable: the last unit always returns")


def change_text(change: Mapping[str, float], *, digits: int = 4) -> str:
    """Writes a difference with its interval: ``+0.0012 [-0.0003, +0.0027]``."""
    form = f"+.{digits}f"
    return f"{change['difference']:{form}} [{change['low']:{form}}, {change['high']:{form}}]"


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return ["  ".join([row[0].ljust(widths[0]), *figures[1:]]) for row, figures in zip(cells, padded, strict=True)]


def _drawn(cells: list[list[str]]) -> list[str]:
    """The table as rich draws it: a bold header, and cells wrapped to the terminal's width."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawing = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, title in enumerate(cells[0]):
        drawing.add_column(Text(title), justify="right" if index else "left", overflow="fold")
    for row in cells[1:]:
        drawing.add_row(*map(Text, row))
    width = max(shutil.get_terminal_size().columns - MARGIN, 40)
    console = Console(file=io.StringIO(), force_terminal=_has_colours(sys.stdout), width=width)
    with console.capture() as capture:
        console.print(drawing)
    return capture.get().splitlines()


def _open_display() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if ProgressBar.display is None:
        columns: tuple[Any, ...] = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} {task.fields[unit]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        console = Console(file=sys.stderr)
        # What goes to a terminal is printed above the bars; what goes to a file stays there.
        ProgressBar.display = Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
        ProgressBar.display.start()
    ProgressBar.open_bars += 1
    return ProgressBar.display


def _width(stream: TextIO) -> int:
    return min(WIDTH, max(shutil.get_terminal_size().columns, 40)) if stream.isatty() else WIDTH


def _has_colours(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _styled(text: str, style: str, stream: TextIO) -> str:
    if not _has_colours(stream):
        return text
    from rich.color import ColorSystem
    from rich.style import Style

    return Style.parse(style).render(text, color_system=ColorSystem.STANDARD)
