"""Checks that training fits, in memory and on disk, and describes how the stages after it will run."""

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
"""Stages with the dense model that a run reaches, by ``run.until``; every other value reaches all."""

TRAINING_DISK = ("checkpoints", "adapter")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the rest of the run needs.

    Attributes:
        memory: Bytes of training at its peak, measured or by the plan; 0 where neither is known.
        least_memory: Those with the smallest micro-batch that training falls back to.
        framework: The part of ``memory`` that a process takes before the first tensor.
        disk: Bytes of training by content.
        later: How each later stage runs.
        later_disk: Bytes of those by content.
    """

    memory: int
    least_memory: int
    framework: int
    disk: dict[str, int]
    later: dict[str, str]
    later_disk: dict[str, int]


def check_memory_and_disk(context: CheckContext) -> CheckResult:
    """Compares what training needs with what is free; what comes later decides nothing.

    Training needs what the plan says or, for ``full``, what real steps, an evaluation and a checkpoint took.
    """
    needs, overfit = needs_of(context), context.overfit_result
    on_gpu = context.device.startswith("cuda")
    held = torch.cuda.memory_reserved() + needs.framework if on_gpu else rss_bytes()
    memory, disk = free_bytes(context.device) + held, shutil.disk_usage(context.run).free
    source = "by the plan, training needs" if needs.memory else "the plan does not know what training needs"
    if overfit is not None:
        rows = f"{overfit.rows} x {overfit.tokens // overfit.rows:,} tokens"
        source = f"steps on {rows}, an evaluation and a checkpoint took"
    parts = [f"{source} {human_bytes(needs.memory)}" if needs.memory else source]
    if needs.least_memory <= memory < needs.memory:
        parts.append("more than there is, so training will run out of memory and halve its micro-batch")
    parts.append(f"disk {_listed(needs.disk)}")
    later = [f"{stage} {how}" for stage, how in needs.later.items()]
    later += [f"disk {_listed(needs.later_disk)}"] if needs.later_disk else []
    parts += [f"later {', '.join(later)}"] if later else []
    return CheckResult(
        passed=needs.least_memory <= memory and sum(needs.disk.values()) <= disk,
        figure="; ".join(parts),
        bound=f"{human_bytes(memory)} of memory, {human_bytes(disk)} of disk at {context.run}",
    )


def needs_of(context: CheckContext) -> Needs:
    """Returns the needs by the plan in the run's folder and, where steps were taken, by these."""
    train, overfit = context.job.config, context.overfit_result
    stages = LATER.get(context.until, ("merge", "eval"))
    file = context.run / "plan" / "manifest.json"
    plan: dict[str, Any] = {"known": False}
    if file.is_file():
        plan = json.loads(file.read_text(encoding="utf-8"))["product"]
    memory, least, framework, disk, later = 0, 0, 0, {}, {}
    if plan["known"]:
        memory, least, disk = plan["needed_bytes"], plan["least_bytes"], plan["disk"]
        framework = plan["phases"]["step"].get("framework", 0)
        later = {stage: plan["later"][stage] for stage in stages}
    if overfit is not None:
        memory = least = overfit.peak_bytes
        framework = 0  # neither figure contains the GPU's context
        if train.checkpoints:
            count = train.keep_checkpoints + 1  # the next one is written before the oldest is deleted
            disk = {**disk, "checkpoints": overfit.checkpoint_bytes * count}
    merged = {"merged": disk["merged"]} if stages and "merged" in disk else {}
    return Needs(
        memory=memory,
        least_memory=least,
        framework=framework,
        disk={name: disk[name] for name in TRAINING_DISK if name in disk},
        later=later,
        later_disk=merged,
    )


def _listed(disk: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in disk.items())
    return f"{human_bytes(sum(disk.values()))} ({parts})" if parts else human_bytes(0)
