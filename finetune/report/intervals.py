"""Pictures of figures with their uncertainty: a dot for the value, a whisker for its 95 % interval; and of counts."""

from collections.abc import Mapping, Sequence

from finetune.report.format import ARTIFACTS, CHANGES, figure, interval, is_share, metric_title, number, percent, signed
from finetune.report.run_data import Fields
from finetune.report.svg import Scale, box, decades, dot, frame, line, picture, text, ticks

ROW = 30
LEFT, RIGHT, WIDTH = 150, 400, 480


def artifact_picture(artifacts: Mapping[str, Fields], metric: str) -> str:
    """One metric of the four artifacts, on the same rows and the same axis."""
    found = {
        name: artifacts[name]["metrics"][metric]
        for name in ARTIFACTS
        if metric in (artifacts.get(name) or {}).get("metrics", {})
    }
    if not found:
        return ""
    edges = [
        edge
        for item in found.values()
        for edge in (item["value"], item.get("low"), item.get("high"))
        if edge is not None
    ]
    share = is_share(edges)
    marks = [0.0, 0.25, 0.5, 0.75, 1.0] if share else ticks(min(0.0, *edges), max(edges))
    scale = Scale(low=marks[0], high=marks[-1], start=LEFT, end=RIGHT)
    bottom = 12 + ROW * len(found)
    parts = _grid(scale, marks, bottom, [percent(mark, digits=0) if share else number(mark) for mark in marks])
    for index, (name, item) in enumerate(found.items()):
        y = 12 + ROW * (index + 0.5)
        tuned = name in ("adapter", "merged")
        hint = (
            f"{ARTIFACTS[name]}: {figure(item['value'], share=share)} ({interval(item, share=share) or 'no interval'})"
        )
        parts += [
            text(LEFT - 12, y + 4, ARTIFACTS[name], anchor="end"),
            *_whisker(scale, item, y, kind="1" if tuned else "0", hint=hint),
        ]
        parts.append(text(WIDTH, y + 4, figure(item["value"], share=share), kind="value", anchor="end"))
    return picture(WIDTH, bottom + 26, parts, title=metric_title(metric))


def change_picture(changes: Mapping[str, Fields], metric: str, *, share: bool) -> str:
    """What quantization cost, tuning gained and the merge cost: paired differences around zero."""
    found = {name: changes[name][metric] for name in CHANGES if metric in changes.get(name, {})}
    if not found:
        return ""
    edges = [
        0.0,
        *(item[key] for item in found.values() for key in ("difference", "low", "high") if item.get(key) is not None),
    ]
    low, high = min(edges), max(edges)
    room = 0.03 * (high - low)
    marks = [mark for mark in ticks(low, high, wanted=4) if low - room <= mark <= high + room]
    scale = Scale(low=low - room, high=high + room, start=LEFT, end=RIGHT)
    bottom = 12 + ROW * len(found)
    parts = [
        *_grid(scale, marks, bottom, [_change_mark(mark, share=share) for mark in marks]),
        line(scale(0), 8, scale(0), bottom, kind="zero"),
    ]
    for index, (name, item) in enumerate(found.items()):
        y = 12 + ROW * (index + 0.5)
        clear = item.get("low") is not None and (item["low"] > 0 or item["high"] < 0)
        value = signed(item["difference"], share=share).replace(" points", "")
        hint = f"{CHANGES[name]}: {signed(item['difference'], share=share)}; {'clearly not zero' if clear else 'zero is within the interval'}"
        parts.append(text(LEFT - 12, y + 4, CHANGES[name], anchor="end"))
        parts += _whisker(scale, item | {"value": item["difference"]}, y, kind="1" if clear else "0", hint=hint)
        parts.append(text(WIDTH, y + 4, value, kind="value", anchor="end"))
    return picture(WIDTH, bottom + 26, parts, title=f"Changes of {metric_title(metric)}")


def _change_mark(mark: float, *, share: bool) -> str:
    return "0" if mark == 0 else f"{100 * mark:+.0f}".replace("-", "−") if share else number(mark)


def _grid(scale: Scale, marks: Sequence[float], bottom: float, names: Sequence[str]) -> list[str]:
    parts = []
    for mark, name in zip(marks, names, strict=True):
        parts += [
            line(scale(mark), 8, scale(mark), bottom, kind="grid"),
            text(scale(mark), bottom + 18, name, anchor="middle"),
        ]
    return parts


def _whisker(scale: Scale, item: Fields, y: float, *, kind: str, hint: str) -> list[str]:
    parts = []
    if item.get("low") is not None and item.get("high") is not None:
        low, high = scale(item["low"]), scale(item["high"])
        parts.append(line(low, y, high, y, kind=f"whisker-{kind}"))
        parts += [line(edge, y - 6, edge, y + 6, kind=f"whisker-{kind}") for edge in (low, high)]
    return [*parts, dot(scale(item["value"]), y, 4.5, kind=f"dot-{kind} plain", title=hint)]


def length_picture(edges: Sequence[float], counts: Sequence[float], *, limit: int | None) -> str:
    """How many rows have how many tokens; ``limit`` is the longest row that may be trained."""
    if not counts or not any(counts):
        return ""
    tall = ticks(0, max(counts))
    across = ticks(0, edges[-1], wanted=8)
    axes = frame(
        box=(56.0, 34.0, 940.0, 210.0), x_ticks=across, y_ticks=tall, x_name="tokens in a row", y_name="rows",
        x_text=lambda v: f"{v:,.0f}", y_text=lambda v: f"{v:,.0f}",
    )  # fmt: skip
    parts = [*axes.parts]
    for low, high, rows in zip(edges, edges[1:], counts, strict=False):
        left, right, top = axes.x(low), axes.x(high), axes.y(rows)
        hint = f"{rows:,.0f} rows of {low:,.0f} to {high:,.0f} tokens"
        parts.append(box(left + 1, top, max(right - left - 2, 1), 210.0 - top, kind="bar", title=hint))
    if limit is not None and limit <= across[-1]:
        parts += [
            line(axes.x(limit), 34, axes.x(limit), 210, kind="zero"),
            text(axes.x(limit) - 6, 46, f"limit {limit:,}", anchor="end"),
        ]
    return picture(960, 254, parts, title="Lengths of the rows", wide=True)


def agreement_picture(candidates: Sequence[Fields], chosen: str) -> str:
    """How far each merge candidate is from the model that was trained: KL divergence on a scale of powers of ten."""
    measured = [item for item in candidates if isinstance(item.get("kl"), int | float)]
    if len(measured) < 2:
        return ""
    smallest = min((item["kl"] for item in measured if item["kl"] > 0), default=1e-6)
    floor = min(smallest, 1e-4)
    marks = decades(floor, max(max(item["kl"] for item in measured), 10 * floor))
    scale = Scale(low=marks[0], high=marks[-1], start=LEFT, end=RIGHT, log=True)
    bottom = 12 + ROW * len(measured)
    parts = _grid(
        scale,
        marks,
        bottom,
        [number(mark) if index % 2 == 0 or len(marks) < 4 else "" for index, mark in enumerate(marks)],
    )
    for index, item in enumerate(measured):
        y = 12 + ROW * (index + 0.5)
        at, kind = scale(max(item["kl"], marks[0])), "1" if item["name"] == chosen else "0"
        parts += [
            text(LEFT - 12, y + 4, item["name"].replace("_", " "), anchor="end"),
            line(scale(marks[0]), y, at, y, kind=f"whisker-{kind}"),
        ]
        parts += [dot(at, y, 5.5, kind=f"dot-{kind}", title=f"{item['name']}: KL {number(item['kl'])}")]
        parts.append(text(WIDTH, y + 4, number(item["kl"]), kind="value", anchor="end"))
    return picture(WIDTH, bottom + 26, parts, title="Distance of each merge from the trained model")
