"""Checks that what follows training fits too: evaluation, save and merge, in memory and on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any

import torch

from finetune.console import human_bytes
from finetune.memory import free_bytes, rss_bytes
from finetune.preflight.context import CheckContext, CheckResult

LATER = {"train": (), "merge": ("merge",), "eval": ("merge", "eval")}
"""Phases of the plan after training that a run reaches, by ``run.until``; every other value reaches all."""

AFTER_MERGING = ("merged",)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that the rest of the run needs.

    Attributes:
        memory: By phase.
        disk: By content.
    """

    memory: dict[str, int]
    disk: dict[str, int]


def check_memory_and_disk(context: CheckContext) -> CheckResult:
    """Compares what the plan and, for ``full``, a real evaluation and checkpoint need with what is free."""
    needs, overfit = needs_of(context), context.overfit_result
    phase = max(needs.memory, key=lambda name: needs.memory[name], default="")
    memory, disk = needs.memory.get(phase, 0), sum(needs.disk.values())
    reserved = torch.cuda.memory_reserved() if context.device.startswith("cuda") else rss_bytes()
    free_memory, free_disk = free_bytes(context.device) + reserved, shutil.disk_usage(context.run).free
    source = "by the plan"
    if overfit is not None:
        source = (
            f"steps on {overfit.rows} x {overfit.tokens // overfit.rows:,} tokens, an evaluation and a checkpoint took "
            f"{human_bytes(overfit.peak_bytes)}"
        )
    later = f"{phase} will need {human_bytes(memory)}" if phase else "no later stage needs the dense model"
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in needs.disk.items())
    return CheckResult(
        passed=memory <= free_memory and disk <= free_disk,
        figure=f"{source}; {later}; disk {human_bytes(disk)} ({parts})",
        bound=f"{human_bytes(free_memory)} of memory, {human_bytes(free_disk)} of disk at {context.run}",
    )


def needs_of(context: CheckContext) -> Needs:
    """Returns the needs by the plan in the run's folder, or by the size of the base's files where the plan has none."""
    train, overfit = context.job.config, context.overfit_result
    later = LATER.get(context.until, ("merge", "eval"))
    file = context.run / "plan" / "manifest.json"
    plan: dict[str, Any] = {"known": False}
    if file.is_file():
        plan = json.loads(file.read_text(encoding="utf-8"))["product"]
    if plan["known"]:
        memory = {phase: sum(plan["phases"].get(phase, {}).values()) for phase in later}
        disk = {name: size for name, size in plan["disk"].items() if name != "base"}
    else:
        dense = sum(weights.stat().st_size for weights in context.spec.base.folder.glob("*.safetensors"))
        memory, disk = dict.fromkeys(later, dense), {"merged": dense}
    if overfit is not None and train.checkpoints:
        count = train.keep_checkpoints + 1  # the next one is written before the oldest is deleted
        disk["checkpoints"] = overfit.checkpoint_bytes * count
    if not later:
        disk = {name: size for name, size in disk.items() if name not in AFTER_MERGING}
    return Needs(memory=memory, disk=disk)
