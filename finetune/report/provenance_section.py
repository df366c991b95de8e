"""What a reader needs to trust it and to do it again: proofs, decisions, environment."""

from typing import Any

import yaml

from finetune.report.format import MISSING, count, duration, number, size
from finetune.report.markup import Html, folded, joined, mark, pairs, section, table, tag
from finetune.report.run_data import Facts, Fields


def proofs(report: Fields) -> Html:
    """What was proved on the real model and the first real rows before the first step."""
    rehearsal = report["preflight"] or {}
    rows = [
        [mark(bool(item["passed"]), "holds" if item["passed"] else "fails"), _capital(item["sentence"]), _plain(item.get("figure")),
         _plain(item.get("bound")), duration(item.get("seconds"))]
        for item in rehearsal.get("proofs") or []
    ]  # fmt: skip
    if not rows:
        return Html("")
    text = "Most mistakes of fine-tuning are silent. These were ruled out on this model and its first rows, before the first step."
    left_out = "; ".join(f"{item['sentence']} ({item['why']})" for item in rehearsal.get("left_out") or [])
    return section(
        "proofs",
        "Proved before training",
        tag("p", f"{text} They ran on {rehearsal['day']}." if rehearsal.get("day") else text),
        table(["", "Proof", "Found", "Bound", "Time"], rows, text_columns=4),
        tag("p", f"Not run: {left_out}.", kind="caption") if left_out else "",
    )


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _plain(value: Any) -> str:
    if value is None:
        return MISSING
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def planned(report: Fields) -> Html:
    """What the plan said before, beside what was measured."""
    plan = report["plan"] or {}
    if not plan.get("known") or not plan.get("peak_bytes"):
        return Html("")
    on_cpu = plan.get("device") == "cpu"
    key, where = (
        ("peak_rss_bytes", "in the whole process, libraries included")
        if on_cpu
        else ("peak_device_bytes", "on the GPU")
    )
    stages = [
        report["stages"][stage][key]
        for stage in ("model", "preflight", "train")
        if report["stages"].get(stage, {}).get(key)
    ]
    largest = (
        f", most of it {plan['largest_term'].replace('_', ' ')} ({size(plan['largest_term_bytes'])})"
        if plan.get("largest_term")
        else ""
    )
    measured = f" Measured: {size(max(stages))} {where}." if stages else ""
    return tag(
        "p",
        f"Planned before anything was loaded: {size(plan['peak_bytes'])} for model and training{largest}.{measured}",
    )


def decisions(report: Fields) -> Html:
    """What the program chose by itself, and why."""
    items = joined(tag("li", reason) for reason in report["decisions"])
    return section("decisions", "Decided automatically", tag("ul", items)) if items else Html("")


def environment(report: Fields, facts: Facts) -> Html:
    """Enough to do it again: command, versions, machine, configuration."""
    told = facts.environment
    entries: list[tuple[str, object]] = [
        ("Command", tag("code", report["command"]) if report["command"] else ""),
        ("Seed", "" if report["seed"] is None else report["seed"]),
        ("Machine", machine_words(told["machine"]) if told.get("machine") else ""),
        (
            "Platform",
            ", ".join(filter(None, [told.get("platform"), f"Python {told['python']}" if told.get("python") else ""])),
        ),
        ("Commit", tag("code", told["commit"]) if told.get("commit") else ""),
        ("Base weights, SHA-256", tag("code", report["model"]["sha256"]) if report["model"].get("sha256") else ""),
        ("Adapter, SHA-256", tag("code", (report["train"] or {}).get("adapter_sha256") or "")),
        ("Data fingerprint", tag("code", (report["data"] or {}).get("fingerprint") or "")),
    ]
    shown = [(name, value) for name, value in entries if value not in ("", "<code></code>")]
    versions = table(
        ["Package", "Version"],
        [[name, value or MISSING] for name, value in (told.get("versions") or {}).items()],
        text_columns=2,
    )
    config = yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True) if facts.config else ""
    return section(
        "environment", "To do it again", pairs(shown), folded("Versions", versions) if versions else "",
        folded("Configuration", tag("pre", config)) if config else "",
    )  # fmt: skip


def machine_words(machine: Fields) -> str:
    """``2 cores, 24.0 GiB memory, no GPU``."""
    gpus = [f"{gpu['name']} ({size(gpu['memory_bytes'])})" for gpu in machine.get("gpus") or []]
    memory = f"{size(machine['ram_bytes'])} memory" if machine.get("ram_bytes") else ""
    return ", ".join(
        filter(
            None,
            [f"{count(machine.get('cores'))} cores", memory, *(gpus or ["no GPU"]), *(machine.get("features") or [])],
        )
    )
