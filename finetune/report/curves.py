"""Pictures over steps and over time: loss, learning rate, memory."""

import math
from collections.abc import Sequence
from itertools import pairwise

from finetune.console import human_bytes
from finetune.report.format import duration, number, stage_title
from finetune.report.run_data import Fields
from finetune.report.svg import Frame, Point, box, dot, frame, line, path, picture, text, ticks

GIB = 1024**3
MIB = 1024**2
WIDTH, HEIGHT = 960, 330
BOX = (56.0, 34.0, 940.0, 284.0)
SMOOTH_FROM_POINTS = 60
MOST_POINTS = 400
LONGEST_PAUSE_SECONDS = 300.0
BAND_LABEL_PIXELS = 7.0
HEADROOM = 1.12
"""Room above the highest line for the names of the stages."""


def series(metrics: Sequence[Fields], name: str) -> list[Point]:
    """(step, value) wherever a line of the metrics file has a finite value; of a step that a resumed run repeats, the later."""
    found = {
        row["step"]: row[name] for row in metrics if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    }
    return sorted(found.items())


def loss_picture(metrics: Sequence[Fields], *, unit: str) -> str:
    """Loss on training and held-out rows over the steps, in ``unit``."""
    train, heldout = series(metrics, "train/loss"), series(metrics, "eval/loss")
    if not train:
        return ""
    values = [value for _, value in [*train, *heldout]]
    low = 0.0 if min(values) < 0.5 * max(values) else min(values)
    last = max(step for step, _ in [*train, *heldout])
    axes = frame(
        box=BOX, x_ticks=ticks(0, last, wanted=8), y_ticks=ticks(low, max(values)), x_end=last, x_name="optimizer steps",
        y_name=f"loss, {unit}", x_text=lambda v: f"{v:,.0f}", y_text=number,
    )  # fmt: skip
    at = [(axes.x(step), axes.y(value)) for step, value in train]
    smooth = len(train) > SMOOTH_FROM_POINTS
    parts = [*axes.parts, path(at, kind="line-1 faint" if smooth else "line-1")]
    if smooth:
        parts.append(
            path([(axes.x(step), axes.y(value)) for step, value in _averaged(train, len(train) // 40)], kind="line-1")
        )
    parts.append(path([(axes.x(step), axes.y(value)) for step, value in heldout], kind="line-2"))
    parts += [
        dot(axes.x(step), axes.y(value), 4.5, kind="dot-2", title=f"step {step:,.0f}: held-out loss {number(value)}")
        for step, value in heldout
    ]
    parts += [
        dot(x, y, 7, kind="hit", title=f"step {step:,.0f}: training loss {number(v)}")
        for (x, y), (step, v) in zip(at, train, strict=True)
    ]
    return picture(WIDTH, HEIGHT, parts, title="Loss over the training steps", wide=True)


def _averaged(points: Sequence[Point], window: int) -> list[Point]:
    """At each point the mean over itself and ``window`` values on either side, as far as there are any."""
    smooth = []
    for index, (step, _) in enumerate(points):
        near = points[max(0, index - window) : index + window + 1]
        smooth.append((step, sum(value for _, value in near) / len(near)))
    return smooth


def small_picture(metrics: Sequence[Fields], key: str, *, name: str) -> str:
    """One figure of training over the steps, half as wide: the learning rate, the norm of the gradient."""
    found = series(metrics, key)
    if len(found) < 2:
        return ""
    last, most = found[-1][0], max(value for _, value in found)
    axes = frame(
        box=(64.0, 34.0, 456.0, 140.0), x_ticks=ticks(0, last, wanted=4), y_ticks=ticks(0, most, wanted=2), x_end=last,
        x_name="optimizer steps", y_name=name, x_text=lambda v: f"{v:,.0f}", y_text=lambda v: f"{v:.3g}",
    )  # fmt: skip
    drawn = path([(axes.x(step), axes.y(value)) for step, value in found], kind="line-1")
    return picture(466, 182, [*axes.parts, drawn], title=name.capitalize())


def memory_picture(memory: Sequence[Fields]) -> str:
    """Memory that the process held over the time that it worked, with the stages as bands."""
    if len(memory) < 2:
        return ""
    times = _working_seconds(memory)
    most = max(max(row["rss_bytes"], row.get("device_bytes", 0)) for row in memory)
    unit, name = (GIB, "GiB") if most > GIB else (MIB, "MiB")
    minutes = times[-1] > 180
    times = [time / 60 for time in times] if minutes else times
    axes = frame(
        box=BOX, x_ticks=ticks(0, times[-1], wanted=8), y_ticks=ticks(0, HEADROOM * most / unit), x_end=times[-1],
        x_name="minutes of work" if minutes else "seconds of work", y_name=name, x_text=lambda v: f"{v:g}", y_text=lambda v: f"{v:g}",
    )  # fmt: skip
    pixels = [axes.x(time) for time in times]
    parts = [*_bands(memory, _working_seconds(memory), pixels), *axes.parts]
    for key, kind in (("rss_bytes", "1"), ("device_bytes", "2")):
        if any(row.get(key, 0) for row in memory):
            points = _thinned([(x, axes.y(row.get(key, 0) / unit)) for x, row in zip(pixels, memory, strict=True)])
            parts += [path(points, kind=f"area-{kind}", down_to=BOX[3]), path(points, kind=f"line-{kind}")]
            parts += _peak(axes, memory, pixels, key=key, unit=unit)
    return picture(WIDTH, HEIGHT, parts, title="Memory over time", wide=True)


def _working_seconds(memory: Sequence[Fields]) -> list[float]:
    """Seconds since the first sample, without the nights between a stop and its resumption."""
    seconds = [0.0]
    for before, after in pairwise(memory):
        gap = after["time"] - before["time"]
        seconds.append(seconds[-1] + (gap if 0 <= gap <= LONGEST_PAUSE_SECONDS else 0.0))
    return seconds


def _bands(memory: Sequence[Fields], times: Sequence[float], pixels: Sequence[float]) -> list[str]:
    parts, start = [], 0
    for index in range(1, len(memory) + 1):
        if index < len(memory) and memory[index]["stage"] == memory[start]["stage"]:
            continue
        left, right = pixels[start], pixels[min(index, len(memory) - 1)]
        name = stage_title(memory[start]["stage"])
        spent = duration(times[min(index, len(memory) - 1)] - times[start])
        parts.append(box(left, BOX[1], right - left, BOX[3] - BOX[1], kind="band", title=f"{name}: {spent}"))
        parts.append(line(left, BOX[1], left, BOX[3], kind="edge"))
        if right - left > BAND_LABEL_PIXELS * len(name):
            parts.append(text((left + right) / 2, BOX[1] + 16, name, kind="band-name", anchor="middle"))
        start = index
    return parts


def _peak(axes: Frame, memory: Sequence[Fields], pixels: Sequence[float], *, key: str, unit: int) -> list[str]:
    index = max(range(len(memory)), key=lambda i: memory[i].get(key, 0))
    x, y = pixels[index], axes.y(memory[index][key] / unit)
    anchor = "end" if x > BOX[2] - 130 else "start"
    where = "device peak" if key == "device_bytes" else "peak"
    return [dot(x, y, 4.5, kind=f"dot-{2 if key == 'device_bytes' else 1}"), text(x + (-9 if anchor == "end" else 9), y - 6,
            f"{where} {human_bytes(memory[index][key])}", kind="value", anchor=anchor)]  # fmt: skip


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most a few hundred points; of each group the highest stays, so no peak is lost."""
    size = max(1, len(points) // MOST_POINTS)
    return [min(points[start : start + size], key=lambda point: point[1]) for start in range(0, len(points), size)]
