"""Draws values with their uncertainty: a dot for the value, a bar for its 95 % interval."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from finetune.html.format import interval, is_share, level, number, percent, signed
from finetune.html.svg import Scale, decades, dot, line, picture, text, ticks
from finetune.report.run_data import Fields
from finetune.report.titles import ARTIFACTS, CHANGES, metric_title

TOP, ROW = 12, 30
LEFT, RIGHT, WIDTH = 150, 400, 480


def artifact_picture(artifacts: Mapping[str, Fields], metric: str) -> Markup:
    """Draws one metric of the four artifacts, on the same rows and the same axis."""
    levels = {name: (artifacts.get(name) or {}).get("metrics", {}).get(metric) for name in ARTIFACTS}
    levels = {name: measured for name, measured in levels.items() if measured is not None}
    if not levels:
        return Markup("")
    edges = [
        edge for item in levels.values() for key in ("value", "low", "high") if (edge := item.get(key)) is not None
    ]
    share = is_share(edges)
    marks = [0.0, 0.25, 0.5, 0.75, 1.0] if share else ticks(min(0.0, *edges), max(edges))
    scale = Scale(low=marks[0], high=marks[-1], start=LEFT, end=RIGHT)
    labels = [percent(mark, digits=0) if share else number(mark) for mark in marks]
    parts = _grid(scale, marks, labels, rows=len(levels))
    for index, (name, measured) in enumerate(levels.items()):
        value = level(measured["value"], share=share)
        parts += _row(
            scale,
            measured,
            y=_middle(index),
            kind="1" if name in ("adapter", "merged") else "0",
            texts=(ARTIFACTS[name], value),
            hint=f"{ARTIFACTS[name]}: {value} ({interval(measured, share=share) or 'no interval'})",
        )
    return _finished(parts, rows=len(levels), title=metric_title(metric))


def change_picture(changes: Mapping[str, Fields], metric: str, *, share: bool) -> Markup:
    """Draws what quantization cost, tuning gained and the merge cost: paired differences around zero."""
    shown = {name: changes[name][metric] for name in CHANGES if metric in changes.get(name, {})}
    if not shown:
        return Markup("")
    keys = ("difference", "low", "high")
    edges = [0.0, *(edge for item in shown.values() for key in keys if (edge := item.get(key)) is not None)]
    low, high = min(edges), max(edges)
    margin = 0.03 * (high - low)
    marks = [mark for mark in ticks(low, high, wanted=4) if low - margin <= mark <= high + margin]
    scale = Scale(low=low - margin, high=high + margin, start=LEFT, end=RIGHT)
    parts = _grid(scale, marks, [_change_mark(mark, share=share) for mark in marks], rows=len(shown))
    parts.append(line(scale(0), 8, scale(0), _bottom(len(shown)), kind="zero"))
    for index, (name, change) in enumerate(shown.items()):
        is_clear = change.get("low") is not None and (change["low"] > 0 or change["high"] < 0)
        value = signed(change["difference"], share=share)
        parts += _row(
            scale,
            {**change, "value": change["difference"]},
            y=_middle(index),
            kind="1" if is_clear else "0",
            texts=(CHANGES[name], value.removesuffix(" points")),
            hint=f"{CHANGES[name]}: {value}; {'clearly not zero' if is_clear else 'the interval contains zero'}",
        )
    return _finished(parts, rows=len(shown), title=f"Changes of {metric_title(metric)}")


def agreement_picture(candidates: Sequence[Fields], chosen: str) -> Markup:
    """Draws the KL divergence of each merge candidate from the model as trained, on a logarithmic axis."""
    measured = [candidate for candidate in candidates if isinstance(candidate.get("kl"), int | float)]
    if len(measured) < 2:
        return Markup("")
    kls = [candidate["kl"] for candidate in measured]
    floor = min([kl for kl in kls if kl > 0] + [1e-4])
    marks = decades(floor, max(*kls, 10 * floor))
    scale = Scale(low=marks[0], high=marks[-1], start=LEFT, end=RIGHT, log=True)
    labels = [number(mark) if index % 2 == 0 or len(marks) < 4 else "" for index, mark in enumerate(marks)]
    parts = _grid(scale, marks, labels, rows=len(measured))
    for index, candidate in enumerate(measured):
        y, x = _middle(index), scale(max(candidate["kl"], marks[0]))
        kind = "1" if candidate["name"] == chosen else "0"
        value = number(candidate["kl"])
        parts += [
            text(LEFT - 12, y + 4, candidate["name"].replace("_", " "), anchor="end"),
            line(scale(marks[0]), y, x, y, kind=f"whisker-{kind}"),
            dot(x, y, 5.5, kind=f"dot-{kind}", title=f"{candidate['name']}: KL {value}"),
            text(WIDTH, y + 4, value, kind="value", anchor="end"),
        ]
    return _finished(parts, rows=len(measured), title="Distance of each merge from the trained model")


def _middle(index: int) -> float:
    return TOP + ROW * (index + 0.5)


def _bottom(rows: int) -> int:
    return TOP + ROW * rows


def _finished(parts: Sequence[str], *, rows: int, title: str) -> Markup:
    return picture(WIDTH, _bottom(rows) + 26, parts, title=title, rows=True)


def _change_mark(mark: float, *, share: bool) -> str:
    return "0" if mark == 0 else f"{100 * mark:+.0f}".replace("-", "−") if share else number(mark)


def _grid(scale: Scale, marks: Sequence[float], labels: Sequence[str], *, rows: int) -> list[str]:
    parts, bottom = [], _bottom(rows)
    for x, label in zip(map(scale, marks), labels, strict=True):
        parts += [line(x, 8, x, bottom, kind="grid"), text(x, bottom + 18, label, anchor="middle")]
    return parts


def _row(scale: Scale, level: Fields, *, y: float, kind: str, texts: tuple[str, str], hint: str) -> list[str]:
    """Draws a name on the left, the value with its interval, and the value as text on the right."""
    name, value = texts
    parts = [text(LEFT - 12, y + 4, name, anchor="end")]
    if level.get("low") is not None and level.get("high") is not None:
        low, high = scale(level["low"]), scale(level["high"])
        parts.append(line(low, y, high, y, kind=f"whisker-{kind}"))
        parts += [line(edge, y - 6, edge, y + 6, kind=f"whisker-{kind}") for edge in (low, high)]
    parts.append(dot(scale(level["value"]), y, 4.5, kind=f"dot-{kind} plain", title=hint))
    return [*parts, text(WIDTH, y + 4, value, kind="value", anchor="end")]
