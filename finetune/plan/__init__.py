"""Will it fit, where, and what would help: bytes per phase from the architecture's dimensions, no weights touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import ModelError
from finetune.plan.config import PlanConfig
from finetune.plan.fit import propose
from finetune.plan.inputs import from_config
from finetune.plan.product import Plan, make_plan
from finetune.plan.show import show

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.hardware import Machine

__all__ = ["Plan", "PlanConfig", "plan", "show"]


def plan(config: RunConfig, machine: Machine) -> Plan:
    """What the run needs in each phase, in closed form: no torch, no download.

    A model whose dimensions are not known gives a plan that says so, since training it is possible all the same.
    """
    try:
        inputs = from_config(config, machine)
    except ModelError as error:
        return Plan(known=False, notes=[f"no plan: {error}"])
    proposal = propose(inputs, machine) if config.plan.fit else []
    return make_plan(inputs, machine, checkpoints=config.train.keep_checkpoints + (config.train.keep == "best"), proposal=proposal)
