"""Replaces ``train.micro_batch=auto`` and ``train.checkpointing=auto`` by what fits the machine and trains fastest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from finetune.console import human_bytes, log
from finetune.errors import ModelError
from finetune.plan import fit, phases
from finetune.plan.inputs import PlanInputs
from finetune.plan.product import device_memory, usable_bytes
from finetune.plan.settings import from_config

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.hardware import Machine
    from finetune.train import TrainConfig

Choice = dict[str, int | str]
"""Values of ``micro_batch``, ``checkpointing`` or both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a training step is divided, chosen or as set.

    Attributes:
        micro_batch: Rows of one forward pass.
        checkpointing: ``none``, ``selective`` or ``full``.
        reasons: What was chosen and why; empty where both were set.
    """

    micro_batch: int
    checkpointing: str
    reasons: tuple[str, ...] = ()


def resolve_auto(config: RunConfig, machine: Machine, *, run: Path) -> RunConfig:
    """Returns the configuration without ``auto``, and prints what was chosen and why; see `resolve_step`."""
    step = resolve_step(config, machine, run=run)
    log("plan", *step.reasons)
    return with_step(config, step)


def with_step(config: RunConfig, step: StepSettings) -> RunConfig:
    """Returns the configuration with these settings."""
    train: TrainConfig = dataclasses.replace(
        config.train, micro_batch=step.micro_batch, checkpointing=step.checkpointing
    )
    return dataclasses.replace(config, train=train)


def resolve_step(config: RunConfig, machine: Machine, *, run: Path | None = None) -> StepSettings:
    """Chooses what is ``auto``: a pure function of configuration and machine, whatever memory is free.

    Args:
        config: The whole configuration.
        machine: The machine.
        run: The run's folder. Where it records a configuration, its values are taken, since a run that continues
            must divide its steps as before.

    Raises:
        HardwareError: The machine cannot compute in ``model.dtype``.
    """
    train = config.train
    if not train.automatic:
        return StepSettings(micro_batch=train.micro_batch_rows, checkpointing=train.checkpointing)
    recorded = _recorded(run) if run else {}
    if train.automatic <= recorded.keys():
        kept = {name: recorded[name] for name in train.automatic}
        return _step(train, kept, reason="as this run began")
    try:
        inputs = from_config(config, machine)
    except ModelError:
        least: Choice = {"micro_batch": 1, "checkpointing": "full"}
        chosen = {name: least[name] for name in train.automatic}
        return _step(train, chosen, reason="they need least, and this model is not planned")
    return chosen_step(config, inputs, machine)


def chosen_step(config: RunConfig, inputs: PlanInputs, machine: Machine) -> StepSettings:
    """Returns the settings of ``inputs``, in which ``auto`` is replaced, with the reason."""
    fitting: Choice = {"micro_batch": inputs.rows, "checkpointing": fit.checkpointing(inputs)}
    chosen = {name: fitting[name] for name in config.train.automatic}
    if not chosen:
        return StepSettings(micro_batch=inputs.rows, checkpointing=fit.checkpointing(inputs))
    memory = device_memory(inputs, machine)
    reason = f"the fastest by the plan that fit in {human_bytes(memory)}"
    if not memory:
        reason = "they need least, and the machine has no such device"
    elif phases.needed(inputs) > usable_bytes(inputs, machine):
        reason = "they need least"
    return _step(config.train, chosen, reason=reason)


def _step(train: TrainConfig, chosen: Choice, *, reason: str) -> StepSettings:
    micro_batch = chosen.get("micro_batch", train.micro_batch)
    settings = ", ".join(f"train.{name}={value}" for name, value in sorted(chosen.items(), reverse=True))
    return StepSettings(
        micro_batch=int(micro_batch),
        checkpointing=str(chosen.get("checkpointing", train.checkpointing)),
        reasons=(f"{settings}: {reason}",),
    )


def _recorded(run: Path) -> Choice:
    """Returns the settings in the run's config.yaml, which are resolved; empty where there is none."""
    file = run / "config.yaml"
    if not file.is_file():
        return {}
    train = yaml.safe_load(file.read_text(encoding="utf-8"))["train"]
    kept = {name: train.get(name, "auto") for name in ("micro_batch", "checkpointing")}
    return {name: value for name, value in kept.items() if value != "auto"}
