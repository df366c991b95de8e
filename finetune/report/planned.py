"""The plan: one bar for each phase, divided into its parts, and the planned peak compared with the measured one."""

from finetune.html import Figure
from finetune.html.format import duration, size
from finetune.html.svg import Scale, box, line, picture, text, ticks
from finetune.report.run_data import Fields

GIB, MIB = 1024**3, 1024**2
PARTS = {
    "model": ("weights", "constants", "unquantized", "cached", "gathered"),
    "adapter, gradients, optimizer": ("adapter", "gradients", "optimizer", "first weights"),
    "activations and loss": ("activations", "loss", "cache", "workspace"),
    "libraries and allocator": ("framework", "allocator"),
}
"""Four parts that a reader can tell apart, and the plan's terms in each."""

TRAINING_PHASES = ("first_step", "step")
"""Phases of the plan that the train stage goes through."""

WIDTH, LEFT, RIGHT, ROW, BAR = 760, 96, 668, 34, 18
Phases = dict[str, dict[str, int]]
"""Bytes of each term, by phase."""


def planned_text(report: Fields) -> str:
    """Compares training as planned with training as measured: memory at its peak, and time where it was known."""
    plan, train = report["plan"] or {}, report["stages"].get("train", {})
    phases = [sum(terms.values()) for name, terms in (plan.get("phases") or {}).items() if name in TRAINING_PHASES]
    if not plan.get("known") or not any(phases):
        return ""
    key, where = "peak_device_bytes", "on the GPU"
    if plan.get("device") == "cpu":
        key, where = "peak_rss_bytes", "in the whole process, with what libraries and earlier stages keep"
    planned, measured = max(phases), train.get(key) or 0
    sentences = [f"Training, planned before anything was loaded: {size(planned)}."]
    if measured:
        sentences.append(f"Measured: {size(measured)} {where} ({measured / planned - 1:+.0%}).")
    seconds, took = (plan.get("seconds") or {}).get("train"), train.get("seconds")
    if seconds and took:
        sentences.append(f"Time, planned from {plan['speed_source']}: {duration(seconds)}; it took {duration(took)}.")
    return " ".join(sentences)


def planned_figure(report: Fields) -> Figure | None:
    """Draws the planned memory of each phase; None without a plan."""
    plan = report["plan"] or {}
    phases = plan.get("phases") or {}
    if not plan.get("known") or not phases:
        return None
    where = "the GPU" if plan.get("device") == "cuda" else "this process"
    if plan.get("devices", 1) > 1:
        where = "each device"
    memory = plan.get("memory_bytes") or 0
    limit = f" The dashed line is the device's memory, {size(memory)}." if _is_shown(memory, phases) else ""
    return Figure(
        picture=bars(phases, memory=memory),
        caption=f"Bytes in {where} for each phase, planned before anything was loaded.{limit}",
        title="Planned memory",
        legend=[(f"part-{number}", name) for number, name in enumerate(PARTS, start=1)],
    )


def bars(phases: Phases, *, memory: int) -> str:
    """Draws one bar for each phase, and the memory as a line unless the bars would vanish next to it."""
    widest = max(sum(terms.values()) for terms in phases.values())
    shown = memory if _is_shown(memory, phases) else 0
    unit, name = (GIB, "GiB") if widest >= GIB else (MIB, "MiB")
    marks = ticks(0, max(widest, shown) / unit)
    x = Scale(low=0, high=marks[-1] * unit, start=LEFT, end=RIGHT)
    bottom = ROW * len(phases) + 8
    parts = [line(x(mark * unit), 0, x(mark * unit), bottom, kind="grid") for mark in marks]
    parts += [text(x(mark * unit), bottom + 16, f"{mark:g} {name}", anchor="middle") for mark in marks]
    for row, (phase, terms) in enumerate(phases.items()):
        parts += _bar(phase.replace("_", " "), terms, x=x, top=ROW * row + 8)
    if shown:
        parts.append(line(x(shown), 0, x(shown), bottom, kind="zero"))
    return picture(WIDTH, bottom + 24, parts, title="planned memory of each phase", wide=True, rows=True)


def _is_shown(memory: int, phases: Phases) -> bool:
    return 0 < memory <= 3 * max(sum(terms.values()) for terms in phases.values())


def _bar(phase: str, terms: dict[str, int], *, x: Scale, top: float) -> list[str]:
    parts = [text(LEFT - 10, top + 14, phase, anchor="end")]
    start = 0
    for number, (part, names) in enumerate(PARTS.items(), start=1):
        amount = sum(terms.get(name, 0) for name in names)
        if amount:
            title = f"{part}: " + ", ".join(f"{name} {size(terms[name])}" for name in names if terms.get(name))
            parts.append(box(x(start), top, x(start + amount) - x(start), BAR, kind=f"part-{number}", title=title))
        start += amount
    return [*parts, text(x(start) + 8, top + 14, size(start), kind="value")]
