"""The plan as a reader meets it: one table, one verdict, one piece of advice."""

from finetune.console import human_bytes, say, table
from finetune.plan.product import Plan

TERMS = (
    "weights", "constants", "unquantized", "cached", "gathered", "adapter", "gradients", "optimizer",
    "activations", "loss", "cache", "workspace", "allocator", "framework",
)  # fmt: skip


def show(plan: Plan) -> Plan:
    """Prints the plan and hands it back."""
    if not plan.known:
        say("plan", *plan.notes)
        return plan
    names = [term for term in TERMS if any(term in terms for terms in plan.phases.values())]
    where = "on each device" if plan.devices > 1 else f"on the {'GPU' if plan.device == 'cuda' else 'CPU, this process included'}"
    rows = [[name, *[_cell(terms.get(name, 0)) for terms in plan.phases.values()]] for name in names]
    totals = ["together", *[human_bytes(sum(terms.values())) for terms in plan.phases.values()]]
    table("plan", [where, *[phase.replace("_", " ") for phase in plan.phases]], [*rows, totals])
    if plan.host:
        say("plan", "host memory: " + ", ".join(f"{phase} {human_bytes(size)}" for phase, size in plan.host.items()))
    say("plan", "disk: " + ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.disk.items()))
    say("plan", *_verdict(plan), *plan.notes, *plan.proposal)
    return plan


def _verdict(plan: Plan) -> list[str]:
    need = (
        f"the peak is {plan.peak_phase.replace('_', ' ')} with {human_bytes(plan.peak_bytes)}, most of it {plan.largest_term} "
        f"({human_bytes(plan.largest_term_bytes)})"
    )
    if plan.fits is None:
        verdict = f"{need}; no such device is here, so whether it fits is open: name one, e.g. hardware=rtx4090"
    else:
        verdict = f"{need}: it {'fits' if plan.fits else 'does not fit'} in {human_bytes(plan.memory_bytes)}"
    if not plan.advice:
        return [verdict]
    return [verdict, f"what would help most: {plan.advice} saves {human_bytes(plan.advice_saves_bytes)} of the peak"]


def _cell(size: float) -> str:
    return human_bytes(size) if size else "-"
