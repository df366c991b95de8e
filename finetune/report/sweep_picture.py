"""Draws parallel coordinates: an upright axis for each swept setting, the held-out loss last, a line for each job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from finetune.html.format import number
from finetune.html.svg import Scale, dot, line, path, picture, text
from finetune.report.run_data import Fields

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 960, 110, 860, 44, 300
HEIGHT = BOTTOM + 20
LOG_FROM_RATIO = 10
"""Positive values with at least this ratio between the largest and the smallest get a logarithmic axis."""

MOST_MARKS = 8
LONGEST_MARK = 22
MARK_PIXELS = 14
LOSS = "held-out loss"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One upright axis.

    Attributes:
        name: The setting, or ``held-out loss``.
        height: Maps a value to pixels.
        marks: Heights and labels.
    """

    name: str
    height: Callable[[str], float]
    marks: list[tuple[float, str]]


def parallel_picture(settings: Sequence[str], jobs: Sequence[Fields]) -> Markup:
    """Draws the jobs that have a held-out loss; better ones lie lower. Empty where there is none.

    Args:
        settings: The swept keys.
        jobs: As in a sweep's report.json.
    """
    if not jobs:
        return Markup("")
    done = [job for job in jobs if job["state"] == "done"]
    best = min(done, key=lambda job: job["held_out"]["loss"], default=None)
    columns = [_column(key, [str(job["changed"][key]) for job in jobs]) for key in settings]
    columns.append(_number_column(LOSS, [job["held_out"]["loss"] for job in jobs]))
    across = Scale(low=0, high=len(columns) - 1, start=LEFT, end=RIGHT)
    parts: list[str] = []
    for index, column in enumerate(columns):
        x = across(index)
        parts += [text(x, TOP - 22, column.name, kind="axis", anchor="middle"), line(x, TOP, x, BOTTOM, kind="edge")]
        parts += [text(x + 8, y + 4, _shortened(label)) for y, label in column.marks]
    for job in sorted(jobs, key=lambda job: job is best):
        points = [(across(index), column.height(_value(job, column.name))) for index, column in enumerate(columns)]
        kind = "line-2" if job is best else "line-1" if job["state"] == "done" else "line-1 faint"
        hint = f"{job['run']}: {number(job['held_out']['loss'])}"
        parts.append(path(points, kind=kind))
        parts += [dot(x, y, 4, kind="dot-2" if job is best else "dot-1", title=hint) for x, y in points]
    return picture(WIDTH, HEIGHT, parts, title="Settings and held-out loss of each job", wide=True)


def _value(job: Fields, name: str) -> str:
    return repr(job["held_out"]["loss"]) if name == LOSS else str(job["changed"][name])


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST_MARK else f"{label[: LONGEST_MARK - 1]}…"


def _column(name: str, values: list[str]) -> Column:
    """Places numbers by size, and anything else evenly in the order of the jobs."""
    try:
        numbers = {float(value): value for value in values}
    except ValueError:
        words = list(dict.fromkeys(values))
        scale = Scale(low=0, high=len(words) - 1, start=BOTTOM, end=TOP)
        heights = {word: scale(index) for index, word in enumerate(words)}
        marks = _readable([(y, word) for word, y in heights.items()])
        return Column(name=name, height=heights.__getitem__, marks=marks)
    return _number_column(name, list(numbers), labels=numbers)


def _number_column(name: str, values: Sequence[float], *, labels: Mapping[float, str] | None = None) -> Column:
    low, high = min(values), max(values)
    log = labels is not None and low > 0 and high / low >= LOG_FROM_RATIO
    scale = Scale(low=low, high=high, start=BOTTOM, end=TOP, log=log)
    if not labels or len(labels) > MOST_MARKS:
        labels = {value: number(value) for value in (low, (low + high) / 2, high)}
    marks = [(scale(value), label) for value, label in sorted(labels.items())]
    return Column(name=name, height=lambda value: scale(float(value)), marks=_readable(marks))


def _readable(marks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Returns the marks without those that would overlap the one before."""
    kept = marks[:1]
    for mark in marks[1:]:
        if abs(mark[0] - kept[-1][0]) >= MARK_PIXELS:
            kept.append(mark)
    return kept
