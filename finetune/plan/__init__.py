"""Will it fit, where, and what would help: bytes per phase from the architecture's dimensions, no weights touched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ModelError
from finetune.model.config import looks_local
from finetune.plan.config import PlanConfig, with_own
from finetune.plan.duration import seconds
from finetune.plan.fit import propose
from finetune.plan.product import Plan, make_plan
from finetune.plan.settings import from_config
from finetune.plan.show import show
from finetune.plan.throughput import throughput, token_operations

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.hardware import Machine
    from finetune.plan.inputs import PlanInputs

__all__ = ["Plan", "PlanConfig", "plan", "show", "with_own"]


def plan(config: RunConfig, machine: Machine) -> Plan:
    """What the run needs in each phase, in closed form: no torch, no download.

    A model whose dimensions are not known gives a plan that says so, since training it is possible all the same.

    Raises:
        ModelError: The model's folder is not there, or ``plan.exact`` was asked for and the model cannot be counted.
    """
    try:
        inputs = from_config(config, machine)
    except ModelError as error:
        if looks_local(config.model.name) and isinstance(error.__cause__, OSError):
            raise
        return Plan(known=False, notes=[f"no plan: {error}"])
    made = make_plan(inputs, machine, checkpoints=config.train.keep_checkpoints + (config.train.select == "best"))
    speed = throughput(inputs, machine, runs=Path(config.run.root) if config.hardware.name == "auto" else None)
    return dataclasses.replace(
        made,
        seconds={stage: round(took, 1) for stage, took in seconds(config, inputs, speed).items()},
        tokens_per_second=round(speed.tokens_per_second, 1),
        speed_source=speed.source,
        token_operations=token_operations(inputs),
        exact=_counted(config, inputs, machine) if config.plan.exact else {},
        proposal=propose(inputs, machine) if config.plan.fit else [],
    )


def _counted(config: RunConfig, inputs: PlanInputs, machine: Machine) -> dict[str, dict[str, int]]:
    from finetune.plan.exact import compare  # imports torch

    return {
        name: {"closed": term.closed, "exact": term.exact} for name, term in compare(config, inputs, machine).items()
    }
