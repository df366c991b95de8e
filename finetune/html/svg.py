"""Draws SVG: scales, ticks and shapes. Colours and type come from the style sheet, by class."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps values from [low, high] to pixels from [start, end]; ``log`` spaces decades evenly."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = (math.log10(number) for number in (low, high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, *, wanted: int = 5) -> list[float]:
    """Returns round values that enclose [low, high]; their step is 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    raw = span / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Returns the powers of ten that enclose [low, high]."""
    return [10.0**power for power in range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1)]


def text(x: float, y: float, content: str, *, kind: str = "label", anchor: str = "start") -> str:
    """Draws a line of text; ``kind`` is its CSS class."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, *, kind: str) -> str:
    """Draws a straight line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def box(x: float, y: float, width: float, height: float, *, kind: str, title: str = "") -> str:
    """Draws a rectangle; ``title`` appears under the pointer."""
    width, height = max(width, 0), max(height, 0)
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}">{_hint(title)}</rect>'


def dot(x: float, y: float, radius: float, *, kind: str, title: str = "") -> str:
    """Draws a disc; ``title`` appears under the pointer."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{kind}">{_hint(title)}</circle>'


def _hint(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""


def path(points: Sequence[Point], *, kind: str, down_to: float | None = None) -> str:
    """Draws a line through points, or fills the area between it and the height ``down_to``."""
    if not points:
        return ""
    moves = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    if down_to is not None:
        moves += f"L{points[-1][0]:g} {down_to:g}L{points[0][0]:g} {down_to:g}Z"
    return f'<path d="{moves}" class="{kind}"/>'


def picture(
    width: int, height: int, parts: Sequence[str], *, title: str, wide: bool = False, rows: bool = False
) -> Markup:
    """Returns the whole picture, named for a screen reader.

    Args:
        width: In pixels.
        height: In pixels.
        parts: What is drawn.
        title: For a screen reader.
        wide: Scrolls sideways on a phone.
        rows: Its values stand one above the other, so that the arrow keys go from row to row.
    """
    head = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" style="max-width:{width}px"'
    drawn = f'<svg {head} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    kinds = " ".join(["scroll", *(["wide"] if wide else []), *(["rows"] if rows else [])])
    return Markup(f'<div class="{kinds}">{drawn}</div>')


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a chart.

    Attributes:
        ticks: Values with a label, ascending.
        name: What it shows, with the unit.
        label: Writes a tick.
        end: Largest value shown; None: the last tick.
        log: Spaces decades evenly.
    """

    ticks: Sequence[float]
    name: str
    label: Callable[[float], str] = "{:g}".format
    end: float | None = None
    log: bool = False

    def scale(self, start: float, end: float) -> Scale:
        """Returns the scale that maps this axis to pixels."""
        high = self.ticks[-1] if self.end is None else self.end
        return Scale(low=self.ticks[0], high=high, start=start, end=end, log=self.log)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Two drawn axes, and the scales to draw by."""

    x: Scale
    y: Scale
    parts: tuple[str, ...]


def frame(corners: tuple[float, float, float, float], *, x: Axis, y: Axis) -> Frame:
    """Draws axes inside ``corners`` = (left, top, right, bottom), in pixels.

    The names stand above the y axis and under the x axis.
    """
    left, top, right, bottom = corners
    across, upward = x.scale(left, right), y.scale(bottom, top)
    parts = [text(left - 44, top - 14, y.name, kind="axis")]
    for tick in y.ticks:
        at = upward(tick)
        parts += [line(left, at, right, at, kind="grid"), text(left - 8, at + 4, y.label(tick), anchor="end")]
    for tick in x.ticks:
        if tick <= across.high * (1 + 1e-9):
            parts.append(text(across(tick), bottom + 18, x.label(tick), anchor="middle"))
    parts += [
        line(left, bottom, right, bottom, kind="base"),
        text(right, bottom + 36, x.name, kind="axis", anchor="end"),
    ]
    return Frame(x=across, y=upward, parts=tuple(parts))
