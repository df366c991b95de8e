"""Prints the plan: one table, one verdict, one piece of advice."""

from finetune.console import human_bytes, log, table
from finetune.plan.product import Plan

TERMS = (
    "weights", "constants", "unquantized", "cached", "gathered", "adapter", "gradients", "optimizer",
    "activations", "loss", "cache", "workspace", "first weights", "allocator", "framework",
)  # fmt: skip


def show(plan: Plan) -> Plan:
    """Prints the plan and returns it."""
    if not plan.known:
        log("plan", *plan.notes)
        return plan
    names = [term for term in TERMS if any(term in terms for terms in plan.phases.values())]
    device = "on the GPU" if plan.device == "cuda" else "on the CPU, this process included"
    where = "on each device" if plan.devices > 1 else device
    rows = [[name, *[_cell(terms.get(name, 0)) for terms in plan.phases.values()]] for name in names]
    totals = ["total", *[human_bytes(sum(terms.values())) for terms in plan.phases.values()]]
    table("plan", [where, *[phase.replace("_", " ") for phase in plan.phases]], [*rows, totals])
    if plan.host:
        phases = ", ".join(f"{phase} {human_bytes(size)}" for phase, size in plan.host.items())
        base = human_bytes(plan.disk["base"])
        mapped = f"while memory is free, load also shows up to {base} of mapped pages of the base's files"
        log("plan", f"host memory: {phases}; {mapped}")
    log("plan", "disk: " + ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.disk.items()))
    log("plan", *_verdict(plan), *([_time(plan)] if plan.seconds else []), *plan.notes)
    if plan.exact:
        _show_exact(plan)
    log("plan", *plan.proposal)
    return plan


def _time(plan: Plan) -> str:
    speed = f"{plan.tokens_per_second:,.0f} tokens/s, from {plan.speed_source}"
    if "train" in plan.seconds:
        train = f"training {human_seconds(plan.seconds['train'])}"
    else:
        million = human_seconds(1e6 / plan.tokens_per_second)
        train = f"training {million} per million tokens (their number is known once the data are read)"
    others = ", ".join(f"{stage} {human_seconds(size)}" for stage, size in plan.seconds.items() if stage != "train")
    return f"time, rough (within a factor of two): {train} at {speed}; {others}"


def _show_exact(plan: Plan) -> None:
    """Prints closed form and count, with their relative differences."""
    differences = {
        name: term["closed"] / term["exact"] - 1 if term["exact"] else 1.0 for name, term in plan.exact.items()
    }
    rows = [
        [name, human_bytes(term["closed"]), human_bytes(term["exact"]), f"{differences[name]:+.1%}"]
        for name, term in plan.exact.items()
    ]
    table("plan", ["one process, in a step", "closed form", "counted", "difference"], rows)
    together = differences.pop("together")
    worst = max(differences, key=lambda name: abs(differences[name]))
    largest = f"the largest difference is {differences[worst]:+.1%} in {worst}"
    log("plan", f"counted on the real modelling code: the total differs by {together:+.1%}; {largest}")


def _verdict(plan: Plan) -> list[str]:
    largest = f"{plan.largest_term} ({human_bytes(plan.largest_term_bytes)})"
    need = f"the peak is {plan.peak_phase.replace('_', ' ')} with {human_bytes(plan.peak_bytes)}, most of it {largest}"
    if plan.needed_bytes < plan.peak_bytes:
        need += f"; without the allocator's idle blocks {human_bytes(plan.needed_bytes)} are needed"
    if plan.fits is None:
        verdict = f"{need}; this machine has no such device to compare with: name one, such as hardware=rtx4090"
    elif plan.obstacle:
        verdict = f"{need}: it does not fit: {plan.obstacle}"
    else:
        verdict = f"{need}: it fits in {human_bytes(plan.memory_bytes)}"
    if not plan.advice:
        return [verdict]
    return [verdict, f"what would help most: {plan.advice} saves {human_bytes(plan.advice_saves_bytes)} of the peak"]


def human_seconds(seconds: float) -> str:
    """Formats ``5400`` as ``1.5 h``: an estimate needs no more than two digits."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _cell(size: float) -> str:
    return human_bytes(size) if size else "-"
