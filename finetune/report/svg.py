"""Pictures as text: scales, ticks and marks. Colours and type come from the page's style sheet, by class."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps values from [low, high] to pixels from [start, end]; ``log`` takes decades evenly."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (self.low, self.high, value)
            if not self.log
            else (math.log10(self.low), math.log10(self.high), math.log10(value))
        )
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, *, wanted: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that cover [low, high]: the first and last enclose it."""
    span = high - low or abs(high) or 1.0
    raw = span / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten that enclose [low, high]."""
    return [10.0**power for power in range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1)]


def text(x: float, y: float, content: str, *, kind: str = "label", anchor: str = "start") -> str:
    """A line of text; ``kind`` is its CSS class."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, *, kind: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def box(x: float, y: float, width: float, height: float, *, kind: str, title: str = "") -> str:
    """A rectangle; ``title`` appears under the pointer."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{max(height, 0):g}" class="{kind}">{inside}</rect>'


def dot(x: float, y: float, radius: float, *, kind: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{kind}">{inside}</circle>'


def path(points: Sequence[Point], *, kind: str, down_to: float | None = None) -> str:
    """A line through points, or the area between it and the height ``down_to``."""
    if not points:
        return ""
    moves = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    if down_to is not None:
        moves += f"L{points[-1][0]:g} {down_to:g}L{points[0][0]:g} {down_to:g}Z"
    return f'<path d="{moves}" class="{kind}"/>'


def picture(width: int, height: int, parts: Sequence[str], *, title: str, wide: bool = False) -> str:
    """The whole picture, named for a screen reader. A wide one scrolls sideways on a phone rather than shrink."""
    drawn = (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" style="max-width:{width}px" '
        f'role="img" aria-label="{escape(title)}">' + "".join(part for part in parts if part) + "</svg>"
    )
    return f'<div class="scroll{" wide" if wide else ""}">{drawn}</div>'


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Two axes with round ticks, and the scales to draw by."""

    x: Scale
    y: Scale
    parts: tuple[str, ...]


def frame(
    *,
    box: tuple[float, float, float, float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_name: str,
    y_name: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    x_end: float | None = None,
    log: bool = False,
) -> Frame:
    """Axes inside ``box`` = (left, top, right, bottom) in pixels; the names stand above the y axis and under the x axis."""
    left, top, right, bottom = box
    end = x_ticks[-1] if x_end is None else x_end
    x = Scale(low=x_ticks[0], high=end, start=left, end=right)
    y = Scale(low=y_ticks[0], high=y_ticks[-1], start=bottom, end=top, log=log)
    parts = [text(left - 44, top - 14, y_name, kind="axis")]
    for value in y_ticks:
        parts += [
            line(left, y(value), right, y(value), kind="grid"),
            text(left - 8, y(value) + 4, y_text(value), anchor="end"),
        ]
    for value in [tick for tick in x_ticks if tick <= end * (1 + 1e-9)]:
        parts.append(text(x(value), bottom + 18, x_text(value), anchor="middle"))
    parts += [
        line(left, bottom, right, bottom, kind="base"),
        text(right, bottom + 36, x_name, kind="axis", anchor="end"),
    ]
    return Frame(x=x, y=y, parts=tuple(parts))
