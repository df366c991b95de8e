"""Estimates whether a run will fit, where, and what would help: bytes per phase, from the architecture's dimensions
alone.

::

    config = load(["+experiment=llama7b_qlora", "hardware=rtx4090"])
    result = show(plan(config, probe(config.hardware)))
    print(result.fits, result.peak_bytes)

No weights are touched, and torch is imported only with ``plan.exact``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ModelError
from finetune.plan.duration import duration
from finetune.plan.fit import checkpointing, propose
from finetune.plan.product import Plan, make_plan, require_fit
from finetune.plan.settings import PlanConfig, from_config
from finetune.plan.show import show
from finetune.plan.step import chosen_step
from finetune.plan.throughput import token_operations

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.hardware import Machine

__all__ = ["Plan", "PlanConfig", "plan", "require_fit", "show"]


def plan(config: RunConfig, machine: Machine) -> Plan:
    """Computes what the run needs in each phase, in closed form: no torch, no weights.

    A model of unknown dimensions gets a plan that says so, since it can be trained all the same.

    Raises:
        ModelError: The model's config.json is missing, the hub cannot be reached, or ``plan.exact`` is set and the
            model cannot be counted.
        HardwareError: The machine cannot compute in ``model.dtype``.
    """
    try:
        inputs = from_config(config, machine)
    except ModelError as error:
        if isinstance(error.__cause__, OSError):  # no such file, or no way to the hub
            raise
        return Plan(known=False, notes=[f"no plan: {error}"])
    planned = make_plan(inputs, machine, checkpoints=config.train.keep_checkpoints + (config.train.select == "best"))
    time = duration(config, inputs, machine, runs=Path(config.run.root) if config.hardware.name == "auto" else None)
    exact = {}
    if config.plan.exact:
        from finetune.plan.exact import compare  # imports torch

        terms = compare(config, inputs, machine)
        exact = {name: {"closed": term.closed, "exact": term.exact} for name, term in terms.items()}
    return dataclasses.replace(
        planned,
        checkpointing=checkpointing(inputs),
        chosen=list(chosen_step(config, inputs, machine).reasons),
        seconds={stage: round(seconds, 1) for stage, seconds in time.seconds.items()},
        tokens_per_second=round(time.tokens_per_second, 1),
        speed_source=time.source,
        speed_is_measured=time.is_measured,
        token_operations=token_operations(inputs),
        exact=exact,
        proposal=propose(inputs, machine) if config.plan.fit else [],
    )
