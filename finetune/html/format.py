"""Writes numbers as a reader wants them; every function of `FILTERS` is also a template filter."""

from collections.abc import Mapping
from typing import Any

from finetune.console import human_bytes

MISSING = "–"
"""Stands for a value that was not measured."""


def number(value: float | None, *, digits: int = 3) -> str:
    """Rounds to three significant digits: ``13.6``, ``0.000081``, ``207,000,000``."""
    if value is None:
        return MISSING
    if value != value or abs(value) == float("inf"):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if abs(value) < 1e-6:
        return f"{value:.1e}"
    text = f"{value:.{digits}g}"
    return f"{value:.7f}".rstrip("0") if "e" in text else text


def count(value: float | None) -> str:
    """Writes ``134515008`` as ``134,515,008``."""
    return MISSING if value is None else f"{value:,.0f}"


def millions(value: float | None) -> str:
    """Writes ``134515008`` as ``134.5 million``."""
    if value is None:
        return MISSING
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.1f} {name}"
    return count(value)


def size(count_bytes: float | None) -> str:
    """Writes ``269060552`` as ``256.6 MiB``."""
    return MISSING if count_bytes is None else human_bytes(count_bytes)


def percent(share: float | None, *, digits: int = 1) -> str:
    """Writes ``0.6375`` as ``63.7 %``."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """Writes ``252`` as ``4 min 12 s``."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def is_share(values: list[float]) -> bool:
    """Returns whether values read best as percentages: all are between 0 and 1."""
    return all(0 <= value <= 1 for value in values)


def level(value: float | None, *, share: bool) -> str:
    """Writes the value of a metric, as a percentage if it is a share."""
    return percent(value) if share else number(value)


def signed(value: float | None, *, share: bool) -> str:
    """Writes a difference with its sign; shares differ by percentage points."""
    if value is None:
        return MISSING
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    return f"{sign}{100 * abs(value):.1f} points" if share else f"{sign}{number(abs(value))}"


def interval(measured: Mapping[str, Any] | None, *, share: bool) -> str:
    """Writes the 95 % interval of a metric: ``54.1 to 70.6 %``; empty if none was measured."""
    if not measured or measured.get("low") is None or measured.get("high") is None:
        return ""
    if share:
        return f"{100 * measured['low']:.1f} to {100 * measured['high']:.1f} %"
    return f"{number(measured['low'])} to {number(measured['high'])}"


FILTERS = (number, count, millions, size, percent, duration)
