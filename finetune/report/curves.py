"""Draws curves over steps and over time: loss, learning rate, memory."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from markupsafe import Markup

from finetune.console import human_bytes
from finetune.html.format import duration, number, size
from finetune.html.svg import Axis, Frame, Point, box, dot, frame, line, path, picture, text, ticks
from finetune.report.run_data import Fields
from finetune.report.titles import stage_title

GIB, MIB = 1024**3, 1024**2
WIDTH, HEIGHT = 960, 330
LEFT, TOP, RIGHT, BOTTOM = CORNERS = (56.0, 34.0, 940.0, 284.0)
SMOOTH_FROM_POINTS = 60
MOST_POINTS = 400
"""Points of a curve that name their value."""

LONGEST_PAUSE_SECONDS = 300.0
BAND_LABEL_PIXELS = 7.0
"""Width of one letter of a stage's name."""

HEADROOM = 1.12
"""Space above the highest line for the names of the stages."""

MINUTES_FROM_SECONDS = 180
PEAK_LABEL_PIXELS = 130


def series(metrics: Sequence[Fields], name: str) -> list[Point]:
    """Returns (step, value) of every finite value; of a step that a resumed run repeats, the later one."""
    rows = (row for row in metrics if isinstance(row.get(name), int | float) and math.isfinite(row[name]))
    return sorted({row["step"]: row[name] for row in rows}.items())


def loss_picture(metrics: Sequence[Fields], *, unit: str) -> Markup:
    """Draws the loss on training and held-out rows over the steps, in ``unit``."""
    return curve_picture(metrics, train="train/loss", heldout="eval/loss", name="loss", unit=unit)


def curve_picture(metrics: Sequence[Fields], *, train: str, heldout: str, name: str, unit: str = "") -> Markup:
    """Draws a figure of training and held-out rows over the steps.

    Args:
        metrics: Lines of train/metrics.jsonl.
        train: Key of the training rows; nothing is drawn without values.
        heldout: Key of the held-out rows.
        name: Of the figure.
        unit: Of its values.
    """
    training, held = series(metrics, train), series(metrics, heldout)
    if not training:
        return Markup("")
    values = [value for _, value in [*training, *held]]
    low = 0.0 if 0 <= min(values) < 0.5 * max(values) else min(values)
    steps = _steps(max(step for step, _ in [*training, *held]), wanted=8)
    title = f"{name}, {unit}" if unit else name
    axes = frame(CORNERS, x=steps, y=Axis(ticks=ticks(low, max(values)), name=title, label=number))
    is_smoothed = len(training) > SMOOTH_FROM_POINTS
    parts = [*axes.parts, path(_pixels(axes, training), kind="line-1 faint" if is_smoothed else "line-1")]
    if is_smoothed:
        parts.append(path(_pixels(axes, _averaged(training, len(training) // 40)), kind="line-1"))
    parts.append(path(_pixels(axes, held), kind="line-2"))
    parts += _named(axes, training, f"training {name}", kind="hit")
    parts += _named(axes, held, f"held-out {name}", kind="dot-2")
    return picture(WIDTH, HEIGHT, parts, title=f"{name.capitalize()} over the training steps", wide=True)


def small_picture(metrics: Sequence[Fields], key: str, *, name: str) -> Markup:
    """Draws one figure of training over the steps, half as wide; empty for one that is always 0."""
    points = series(metrics, key)
    lowest, highest = (edge((0.0, *(value for _, value in points))) for edge in (min, max))
    if len(points) < 2 or lowest == highest:
        return Markup("")
    steps = _steps(points[-1][0], wanted=4)
    upward = Axis(ticks=ticks(lowest, highest, wanted=2), name=name, label="{:.3g}".format)
    axes = frame((64.0, 34.0, 456.0, 140.0), x=steps, y=upward)
    parts = [*axes.parts, path(_pixels(axes, points), kind="line-1"), *_named(axes, points, name, kind="hit")]
    return picture(466, 182, parts, title=name.capitalize())


def _steps(last: float, *, wanted: int) -> Axis:
    marks = ticks(0, last, wanted=max(1, min(wanted, int(last))))  # whole steps
    return Axis(ticks=marks, name="optimizer steps", label="{:,.0f}".format, end=last)


def _named(axes: Frame, points: Sequence[Point], name: str, *, kind: str) -> Iterator[str]:
    """Draws dots that name their step and value; of many points every few, and always the last."""
    apart = max(1, len(points) // MOST_POINTS)
    shown = [*points[:-1:apart], *points[-1:]]
    for (step, value), (x, y) in zip(shown, _pixels(axes, shown), strict=True):
        yield dot(x, y, 4.5, kind=kind, title=f"step {step:,.0f}: {name} {number(value)}")


def _pixels(axes: Frame, points: Sequence[Point]) -> list[Point]:
    return [(axes.x(x), axes.y(y)) for x, y in points]


def _averaged(points: Sequence[Point], window: int) -> list[Point]:
    """Returns at each point the mean over itself and up to ``window`` values on either side."""
    smooth = []
    for index, (step, _) in enumerate(points):
        neighbours = points[max(0, index - window) : index + window + 1]
        smooth.append((step, sum(value for _, value in neighbours) / len(neighbours)))
    return smooth


def memory_picture(memory: Sequence[Fields]) -> Markup:
    """Draws the memory of the process over its working time, with the stages as bands."""
    if len(memory) < 2:
        return Markup("")
    seconds = _working_seconds(memory)
    peak = max(max(row["rss_bytes"], row.get("device_bytes", 0)) for row in memory)
    unit, unit_name = (GIB, "GiB") if peak > GIB else (MIB, "MiB")
    scale, time_name = (60, "minutes of work") if seconds[-1] > MINUTES_FROM_SECONDS else (1, "seconds of work")
    end = seconds[-1] / scale
    across = Axis(ticks=ticks(0, end, wanted=8), name=time_name, end=end)
    axes = frame(CORNERS, x=across, y=Axis(ticks=ticks(0, HEADROOM * peak / unit), name=unit_name))
    pixels = [axes.x(time / scale) for time in seconds]
    parts = [*_bands(memory, pixels), *axes.parts]
    for key, kind in (("rss_bytes", "1"), ("device_bytes", "2")):
        if any(row.get(key, 0) for row in memory):
            heights = [axes.y(row.get(key, 0) / unit) for row in memory]
            points = list(zip(pixels, heights, strict=True))
            kept = _thinned(heights)
            shown = [points[at] for at in kept]
            parts += [path(shown, kind=f"area-{kind}", down_to=BOTTOM), path(shown, kind=f"line-{kind}")]
            parts += _peak(memory, points, key=key, kind=kind)
            for at in kept:
                title = f"{stage_title(memory[at]['stage'])}, {duration(seconds[at])}: {size(memory[at].get(key, 0))}"
                parts.append(dot(*points[at], 4.5, kind="hit", title=title))
    return picture(WIDTH, HEIGHT, parts, title="Memory over time", wide=True)


def _working_seconds(memory: Sequence[Fields]) -> list[float]:
    """Returns seconds since the first sample, without the pauses between a stop and its resumption."""
    seconds = [0.0]
    for before, after in pairwise(memory):
        gap = after["time"] - before["time"]
        seconds.append(seconds[-1] + (gap if 0 <= gap <= LONGEST_PAUSE_SECONDS else 0.0))
    return seconds


def _bands(memory: Sequence[Fields], pixels: Sequence[float]) -> Iterator[str]:
    start = 0
    for stage, samples in groupby(memory, key=lambda row: row["stage"]):
        after = start + len(list(samples))
        end = min(after, len(memory) - 1)
        left, right, name = pixels[start], pixels[end], stage_title(stage)
        yield box(left, TOP, right - left, BOTTOM - TOP, kind="band")
        yield line(left, TOP, left, BOTTOM, kind="edge")
        if right - left > BAND_LABEL_PIXELS * len(name):
            yield text((left + right) / 2, TOP + 16, name, kind="band-name", anchor="middle")
        start = after


def _peak(memory: Sequence[Fields], points: Sequence[Point], *, key: str, kind: str) -> list[str]:
    index = max(range(len(memory)), key=lambda at: memory[at].get(key, 0))
    x, y = points[index]
    is_right = x > RIGHT - PEAK_LABEL_PIXELS
    label = f"{'device peak' if key == 'device_bytes' else 'peak'} {human_bytes(memory[index][key])}"
    anchor, shift = ("end", -9) if is_right else ("start", 9)
    return [dot(x, y, 4.5, kind=f"dot-{kind}"), text(x + shift, y - 6, label, kind="value", anchor=anchor)]


def _thinned(heights: Sequence[float]) -> list[int]:
    """Returns the positions of a few hundred points; of each group the highest is kept, so no peak is lost."""
    length = max(1, len(heights) // MOST_POINTS)
    groups = (range(start, min(start + length, len(heights))) for start in range(0, len(heights), length))
    return [min(group, key=heights.__getitem__) for group in groups]  # pixels are counted from the top
