"""What a reader needs in order to trust a run and to reproduce it: checks and environment."""

from __future__ import annotations

from typing import Any

from finetune.html import Table
from finetune.html.format import MISSING, count, number, size
from finetune.report.run_data import Fields, RunData


def checks_section(report: Fields) -> Fields:
    """Collects the checks of the preflight stage. Only this function knows the keys of a check."""
    preflight = report["preflight"] or {}
    checks = [
        {
            "passed": bool(check["passed"]),
            "sentence": check["sentence"][:1].upper() + check["sentence"][1:],
            "measured": _text(check.get("figure")),
            "bound": _text(check.get("bound")),
            "seconds": check.get("seconds"),
        }
        for check in preflight.get("checks") or []
    ]
    skipped = [f"{check['sentence']} ({check['why']})" for check in preflight.get("skipped") or []]
    return {"shown": checks, "skipped": skipped, "day": preflight.get("day") or ""}


def _text(value: Any) -> str:
    if value is None:
        return MISSING
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def environment_section(report: Fields, data: RunData) -> Fields:
    """Collects command, versions and machine."""
    environment = data.environment
    machine, python = environment.get("machine"), environment.get("python")
    hashes = {
        "Base weights, SHA-256": report["model"].get("sha256"),
        "Adapter, SHA-256": (report["train"] or {}).get("adapter_sha256"),
        "Data fingerprint": (report["data"] or {}).get("fingerprint"),
    }
    entries = {
        "Command": report["command"],
        "Seed": "" if report["seed"] is None else str(report["seed"]),
        "Machine": machine_text(machine) if machine else "",
        "Platform": ", ".join(filter(None, [environment.get("platform"), python and f"Python {python}"])),
        "Commit": environment.get("commit"),
        **hashes,
    }
    versions = [[name, version or MISSING] for name, version in (environment.get("versions") or {}).items()]
    return {
        "entries": [(name, value) for name, value in entries.items() if value],
        "code": frozenset({"Command", "Commit", *hashes}),
        "versions": Table(header=["Package", "Version"], rows=versions, text_columns=2),
    }


def machine_text(machine: Fields) -> str:
    """Returns ``2 cores, 24.0 GiB memory, no GPU``."""
    gpus = [f"{gpu['name']} ({size(gpu['memory_bytes'])})" for gpu in machine.get("gpus") or []]
    memory = f"{size(machine['ram_bytes'])} memory" if machine.get("ram_bytes") else ""
    parts = [f"{count(machine.get('cores'))} cores", memory, *(gpus or ["no GPU"]), *(machine.get("features") or [])]
    return ", ".join(filter(None, parts))
