"""Checks that training fits, in memory and on disk, and describes how the stages after it will run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from finetune.console import human_bytes
from finetune.memory import free_bytes, rss_bytes
from finetune.preflight.context import CheckContext, CheckResult

if TYPE_CHECKING:
    from finetune.preflight.overfit import OverfitResult
    from finetune.train import TrainConfig

LATER = {"train": (), "merge": ("merge",), "eval": ("merge", "eval")}
"""Stages with the dense model that a run reaches, by ``run.until``; every other value reaches all."""

TRAINING_DISK = ("checkpoints", "adapter")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the rest of the run needs.

    Attributes:
        source: Where ``memory`` comes from, in words.
        memory: Bytes of training at its peak, measured or by the plan; 0 where neither is known.
        least_memory: Those with the smallest micro-batch that training falls back to.
        framework: The part of ``memory`` that a process takes before the first tensor.
        disk: Bytes of training by content.
        later: How each later stage runs.
        later_disk: Bytes of those by content.
    """

    source: str
    memory: int = 0
    least_memory: int = 0
    framework: int = 0
    disk: dict[str, int] = field(default_factory=dict)
    later: dict[str, str] = field(default_factory=dict)
    later_disk: dict[str, int] = field(default_factory=dict)


def check_memory_and_disk(context: CheckContext) -> CheckResult:
    """Compares what training needs with what is free; what comes later decides nothing.

    Training needs what the plan says or, for ``full``, what real steps, an evaluation and a checkpoint took.
    """
    file, overfit = context.run / "plan" / "manifest.json", context.overfit_result
    plan: dict[str, Any] = {"known": False}
    if file.is_file():
        plan = json.loads(file.read_text(encoding="utf-8"))["product"]
    needs = planned_needs(plan, until=context.until)
    if overfit is not None:
        needs = measured_needs(needs, overfit, context.job.config)
    on_gpu = context.device.startswith("cuda")
    held = torch.cuda.memory_reserved() + needs.framework if on_gpu else rss_bytes()
    memory, disk = free_bytes(context.device) + held, shutil.disk_usage(context.run).free
    return compare(needs, memory=memory, disk=disk)


def compare(needs: Needs, *, memory: int, disk: int) -> CheckResult:
    """Passes where training fits, in the last resort with the smallest micro-batch that it falls back to."""
    parts = [f"{needs.source} {human_bytes(needs.memory)}" if needs.memory else needs.source]
    if needs.least_memory <= memory < needs.memory:
        parts.append("more than there is, so training will halve its micro-batch when memory runs out")
    parts.append(f"disk {_listed(needs.disk)}")
    later = [f"{stage} {how}" for stage, how in needs.later.items()]
    later += [f"disk {_listed(needs.later_disk)}"] if needs.later_disk else []
    parts += [f"later {', '.join(later)}"] if later else []
    return CheckResult(
        passed=needs.least_memory <= memory and sum(needs.disk.values()) <= disk,
        figure="; ".join(parts),
        bound=f"{human_bytes(memory)} of memory, {human_bytes(disk)} of disk in the run's folder",
    )


def planned_needs(plan: dict[str, Any], *, until: str) -> Needs:
    """Returns the needs by the plan's manifest.

    Args:
        plan: The manifest's product.
        until: ``run.until``.
    """
    if not plan["known"]:
        return Needs(source="the plan does not know what training needs")
    stages, disk = LATER.get(until, ("merge", "eval")), plan["disk"]
    return Needs(
        source="by the plan, training needs",
        memory=plan["needed_bytes"],
        least_memory=plan["least_bytes"],
        framework=plan["phases"]["step"].get("framework", 0),
        disk={name: disk[name] for name in TRAINING_DISK},
        later={stage: plan["later"][stage] for stage in stages},
        later_disk={"merged": disk["merged"]} if stages else {},
    )


def measured_needs(needs: Needs, overfit: OverfitResult, train: TrainConfig) -> Needs:
    """Replaces what the plan says by what steps on the largest batch took."""
    disk = needs.disk
    if train.saves:
        count = train.keep_checkpoints + 1  # the next one is written before the oldest is deleted
        disk = {**disk, "checkpoints": overfit.checkpoint_bytes * count}
    rows = f"{overfit.rows} x {overfit.tokens // overfit.rows:,} tokens"
    return dataclasses.replace(
        needs,
        source=f"steps on {rows}, an evaluation and a checkpoint took",
        memory=overfit.peak_bytes,
        least_memory=overfit.peak_bytes,
        framework=0,  # a GPU's context is in neither figure
        disk=disk,
    )


def _listed(disk: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in disk.items())
    return f"{human_bytes(sum(disk.values()))} ({parts})" if parts else human_bytes(0)
