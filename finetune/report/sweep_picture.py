"""Parallel coordinates: one upright axis for each swept setting, the held-out loss last, one line for each job."""

from collections.abc import Callable, Sequence

from finetune.report.format import number
from finetune.report.run_data import Fields
from finetune.report.svg import Scale, dot, line, path, picture, text

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 960, 110, 860, 44, 300
HEIGHT = BOTTOM + 20
LOG_FROM_RATIO = 10
"""Positive numbers that far apart stand on a logarithmic axis."""

MOST_MARKS = 8
LONGEST_MARK = 22


def parallel_picture(settings: Sequence[str], jobs: Sequence[Fields]) -> str:
    """Jobs with a held-out loss; better ones lie lower. Empty where there is none.

    Args:
        settings: The swept keys.
        jobs: As in a sweep's report.json.
    """
    if not jobs:
        return ""
    losses = [job["held_out"]["loss"] for job in jobs]
    best = min((job for job in jobs if job["state"] == "done"), key=lambda job: job["held_out"]["loss"], default=None)
    columns = [(key, *_axis([str(job["changed"][key]) for job in jobs])) for key in settings]
    columns.append(("held-out loss", *_numbers(losses)))
    across = Scale(low=0, high=len(columns) - 1, start=LEFT, end=RIGHT)
    parts: list[str] = []
    for index, (name, _, marks) in enumerate(columns):
        x = across(index)
        parts += [text(x, TOP - 22, name, kind="axis", anchor="middle"), line(x, TOP, x, BOTTOM, kind="edge")]
        parts += [
            text(x + 8, y + 4, label if len(label) <= LONGEST_MARK else f"{label[: LONGEST_MARK - 1]}…")
            for y, label in marks
        ]
    for job in sorted(jobs, key=lambda job: job is best):
        at = [place(_value(job, name)) for name, place, _ in columns]
        points = [(across(index), y) for index, y in enumerate(at)]
        kind = "line-2" if job is best else "line-1" if job["state"] == "done" else "line-1 faint"
        hint = f"{job['run']}: {number(job['held_out']['loss'])}"
        parts.append(path(points, kind=kind))
        parts += [dot(x, y, 4, kind="dot-2" if job is best else "dot-1", title=hint) for x, y in points]
    return picture(WIDTH, HEIGHT, parts, title="Settings and held-out loss of each job", wide=True)


Axis = tuple[Callable[[str], float], list[tuple[float, str]]]


def _value(job: Fields, name: str) -> str:
    return repr(job["held_out"]["loss"]) if name == "held-out loss" else str(job["changed"][name])


def _axis(values: list[str]) -> Axis:
    """Numbers by size, anything else evenly in the order of the jobs."""
    try:
        return _numbers([float(value) for value in values], labels={float(value): value for value in values})
    except ValueError:
        names = list(dict.fromkeys(values))
        scale = Scale(low=0, high=len(names) - 1, start=BOTTOM, end=TOP)
        places = {name: scale(index) for index, name in enumerate(names)}
        return places.__getitem__, _apart([(y, name) for name, y in places.items()])


def _numbers(values: Sequence[float], *, labels: dict[float, str] | None = None) -> Axis:
    low, high = min(values), max(values)
    scale = Scale(
        low=low, high=high, start=BOTTOM, end=TOP, log=labels is not None and low > 0 and high / low >= LOG_FROM_RATIO
    )
    marks = (
        labels
        if labels and len(labels) <= MOST_MARKS
        else {value: number(value) for value in (low, (low + high) / 2, high)}
    )
    return lambda value: scale(float(value)), _apart([(scale(value), label) for value, label in sorted(marks.items())])


def _apart(marks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without those that would lie on the one before."""
    kept = marks[:1]
    for mark in marks[1:]:
        if abs(mark[0] - kept[-1][0]) >= 14:
            kept.append(mark)
    return kept
