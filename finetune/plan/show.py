"""Prints the plan: the verdict, what would help, and on request the bytes of each phase."""

from finetune.console import human_bytes, log, table
from finetune.plan.product import Plan

TERMS = (
    "weights", "constants", "unquantized", "cached", "gathered", "adapter", "gradients", "optimizer",
    "activations", "loss", "cache", "workspace", "first weights", "allocator", "framework",
)  # fmt: skip


def show(plan: Plan, *, verbose: bool = False) -> Plan:
    """Prints the plan, its verdict first, and returns it.

    Args:
        plan: The plan.
        verbose: Also prints the bytes of each phase by term.
    """
    if not plan.known:
        log("plan", *plan.notes)
        return plan
    log("plan", plan.verdict, style={True: "bold green", False: "bold red", None: "bold"}[plan.fits])
    log("plan", *plan.chosen, *_peak(plan), _later(plan), _time(plan), *plan.notes)
    if verbose:
        show_phases(plan)
    if plan.exact:
        _show_exact(plan)
    log("plan", *plan.proposal)
    return plan


def show_phases(plan: Plan) -> None:
    """Prints the bytes of each phase by term, and the memory of the host."""
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


def _peak(plan: Plan) -> list[str]:
    """Returns what takes the memory, and what would help most."""
    largest = f"{plan.largest_term} ({human_bytes(plan.largest_term_bytes)})"
    need = f"training peaks at {human_bytes(plan.peak_bytes)} ({plan.peak_phase.replace('_', ' ')})"
    need += f", most of it {largest}"
    if plan.needed_bytes < plan.peak_bytes:
        need += f"; without the allocator's idle blocks {human_bytes(plan.needed_bytes)}"
    if not plan.advice:
        return [need]
    return [need, f"what would help most: {plan.advice} saves {human_bytes(plan.advice_saves_bytes)}"]


def _later(plan: Plan) -> str:
    stages = "; ".join(f"{stage} {text}" for stage, text in plan.later.items())
    return f"after training: {stages}; disk {human_bytes(sum(plan.disk.values()))}"


def _time(plan: Plan) -> str:
    if not plan.tokens_per_second:
        return f"time: {plan.speed_source}"
    speed = f"{plan.tokens_per_second:,.0f} tokens/s"
    if "train" in plan.seconds:
        train = f"training {human_seconds(plan.seconds['train'])} at {speed}"
    else:
        train = f"training {human_seconds(1e6 / plan.tokens_per_second)} per million tokens at {speed}"
    if not plan.speed_is_measured:
        return f"time: at best {train}, by {plan.speed_source}; smaller models are much slower than those say"
    later = [f"{stage} {human_seconds(plan.seconds[stage])}" for stage in ("merge", "eval") if stage in plan.seconds]
    return f"time: {'; '.join([train, *later])}, from {plan.speed_source}"


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


def human_seconds(seconds: float) -> str:
    """Formats ``5400`` as ``1.5 h``: an estimate needs no more than two digits."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _cell(size: float) -> str:
    return human_bytes(size) if size else "-"
