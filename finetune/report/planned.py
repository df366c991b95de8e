"""What was planned, as bars: one for each phase, cut into what it is made of, beside the device's memory."""

from finetune.report.format import size
from finetune.report.markup import Html, figure
from finetune.report.run_data import Fields
from finetune.report.svg import Scale, box, line, picture, text, ticks

PARTS = {
    "model": ("weights", "constants", "unquantized", "cached", "gathered"),
    "adapter, gradients, optimizer": ("adapter", "gradients", "optimizer", "first weights"),
    "activations and loss": ("activations", "loss", "cache", "workspace"),
    "libraries and allocator": ("framework", "allocator"),
}
"""Four parts that a reader can tell apart, and the plan's terms in each."""

WIDTH, LEFT, RIGHT, ROW, BAR = 760, 96, 668, 34, 18


def planned_bars(report: Fields) -> Html:
    """The figure for the page; empty where there is no plan."""
    plan = report["plan"] or {}
    phases = plan.get("phases") or {}
    if not plan.get("known") or not phases:
        return Html("")
    where = (
        "each device" if plan.get("devices", 1) > 1 else "the GPU" if plan.get("device") == "cuda" else "this process"
    )
    memory = plan.get("memory_bytes") or 0
    told = f" The dashed line is the device's memory, {size(memory)}." if _is_shown(memory, phases) else ""
    legend = [(f"part-{number}", name) for number, name in enumerate(PARTS, start=1)]
    caption = f"Bytes in {where} for each phase, planned before anything was loaded.{told}"
    return figure(bars(phases, memory=memory), caption, title="Planned memory", legend=legend)


def bars(phases: dict[str, dict[str, int]], *, memory: int) -> str:
    """One bar a phase; the memory as a line, unless the bars would vanish beside it."""
    widest = max(sum(terms.values()) for terms in phases.values())
    shown = memory if _is_shown(memory, phases) else 0
    unit = 1024**3 if widest >= 1024**3 else 1024**2
    marks = ticks(0, max(widest, shown) / unit)
    x = Scale(low=0, high=marks[-1] * unit, start=LEFT, end=RIGHT)
    bottom = ROW * len(phases) + 8
    parts = [line(x(mark * unit), 0, x(mark * unit), bottom, kind="grid") for mark in marks]
    name = "GiB" if unit == 1024**3 else "MiB"
    parts += [text(x(mark * unit), bottom + 16, f"{mark:g} {name}", anchor="middle") for mark in marks]
    for row, (phase, terms) in enumerate(phases.items()):
        parts += _bar(phase.replace("_", " "), terms, x=x, top=ROW * row + 8)
    if shown:
        parts.append(line(x(shown), 0, x(shown), bottom, kind="zero"))
    return picture(WIDTH, bottom + 24, parts, title="planned memory of each phase", wide=True)


def _is_shown(memory: int, phases: dict[str, dict[str, int]]) -> bool:
    return 0 < memory <= 3 * max(sum(terms.values()) for terms in phases.values())


def _bar(phase: str, terms: dict[str, int], *, x: Scale, top: float) -> list[str]:
    drawn = [text(LEFT - 10, top + 14, phase, anchor="end")]
    at = 0
    for number, (part, names) in enumerate(PARTS.items(), start=1):
        amount = sum(terms.get(name, 0) for name in names)
        if amount:
            title = f"{part}: " + ", ".join(f"{name} {size(terms[name])}" for name in names if terms.get(name))
            drawn.append(box(x(at), top, x(at + amount) - x(at), BAR, kind=f"part-{number}", title=title))
        at += amount
    return [*drawn, text(x(at) + 8, top + 14, size(at), kind="value")]
