"""The proof that what comes after training fits too: evaluation, save and merge, in memory and on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any

import torch

from finetune.console import human_bytes
from finetune.memory import rss_bytes
from finetune.preflight.context import CheckContext, CheckResult
from finetune.preflight.training_checks import free_bytes

LATER = {"train": (), "merge": ("merge",), "eval": ("merge", "eval")}
"""Phases of the plan after training that a run comes to, by ``run.until``; the others come to all."""

AFTER_MERGING = ("merged",)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that are still to come.

    Attributes:
        memory: By phase.
        disk: By what they hold.
    """

    memory: dict[str, int]
    disk: dict[str, int]


def the_rest_fits(context: CheckContext) -> CheckResult:
    """From the plan's figures, and from a real evaluation and checkpoint where there were any."""
    needs = needs_of(context)
    phase = max(needs.memory, key=lambda name: needs.memory[name], default="")
    memory, disk = needs.memory.get(phase, 0), sum(needs.disk.values())
    held = torch.cuda.memory_reserved() if context.device.startswith("cuda") else rss_bytes()
    there, left = free_bytes(context.device) + held, shutil.disk_usage(context.run).free
    measured = "by the plan"
    if context.lesson is not None:
        measured = f"steps on {context.lesson.rows} x {context.lesson.tokens // context.lesson.rows:,} tokens, an evaluation and a checkpoint took "
        measured += f"{human_bytes(context.lesson.peak_bytes)}"
    later = f"{phase} will need {human_bytes(memory)}" if phase else "no later stage needs the dense model"
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in needs.disk.items())
    return CheckResult(
        passed=memory <= there and disk <= left,
        figure=f"{measured}; {later}; disk {human_bytes(disk)} ({parts})",
        bound=f"{human_bytes(there)} of memory, {human_bytes(left)} of disk at {context.run}",
    )


def needs_of(context: CheckContext) -> Needs:
    """What the plan in the run folder says; where it knows nothing, what the base's files weigh."""
    train = context.job.config
    later = LATER.get(context.until, ("merge", "eval"))
    file = context.run / "plan" / "manifest.json"
    plan: dict[str, Any] = (
        json.loads(file.read_text(encoding="utf-8"))["product"] if file.is_file() else {"known": False}
    )
    if plan["known"]:
        memory = {phase: sum(plan["phases"].get(phase, {}).values()) for phase in later}
        disk = {name: size for name, size in plan["disk"].items() if name != "base"}
    else:
        dense = sum(weights.stat().st_size for weights in context.spec.base.folder.glob("*.safetensors"))
        memory, disk = dict.fromkeys(later, dense), {"merged": dense}
    if context.lesson is not None and train.checkpoints:
        disk["checkpoints"] = context.lesson.checkpoint_bytes * (
            train.keep_checkpoints + 1
        )  # the next is written before the oldest goes
    if not later:
        disk = {name: size for name, size in disk.items() if name not in AFTER_MERGING}
    return Needs(memory=memory, disk=disk)
