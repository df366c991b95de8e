"""A table of configurations by card: whether the whole line runs there, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.plan import phases
from finetune.plan.fit import checkpointing
from finetune.plan.inputs import GIB
from finetune.plan.product import device_memory, obstacle
from finetune.plan.settings import from_config

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.hardware import Machine

CARDS = {
    "8 GB": "rtx4060_8gb",
    "12 GB": "rtx3060_12gb",
    "16 GB": "rtx4060ti_16gb",
    "24 GB": "rtx4090",
    "48 GB": "a6000",
    "80 GB": "a100_80gb",
    "2 x 24 GB": "2xrtx4090",
}
"""Column of the table, and the option of ``conf/hardware`` that stands for it."""

IN_PARTS = "*"


def cards_table(configs: Mapping[str, RunConfig], machines: Mapping[str, Machine]) -> list[str]:
    """Returns the lines of a Markdown table.

    Args:
        configs: Configurations by the name of their row.
        machines: Machines by the name of their column.
    """
    rows = [
        [f"`{name}`", *(cell(config, machine) for machine in machines.values())] for name, config in configs.items()
    ]
    lines = [["experiment", *machines], ["---"] * (len(machines) + 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def cell(config: RunConfig, machine: Machine) -> str:
    """Returns ``8.8 (4, full)``: GiB of training, its micro-batch and checkpointing; or why it does not fit.

    Several GPUs are used by data parallelism where the configuration does not say how. A star stands for later stages
    that do not fit at once and run in parts.
    """
    gpus = len(machine.gpus)
    if gpus > 1 and config.launch.strategy == "single":
        launch = dataclasses.replace(config.launch, strategy="ddp", processes=gpus)
        config = dataclasses.replace(config, launch=launch)
    if config.launch.processes > gpus:
        return f"no: {config.launch.processes} GPUs"
    inputs = from_config(config, machine)
    needed, memory = phases.needed(inputs), device_memory(inputs, machine)
    host = max(phases.host_bytes(inputs).values(), default=0.0)
    if obstacle(inputs, machine, host=host, memory=memory):
        return f"no: {needed / GIB:.1f}"
    later = [
        phases.later_placement(inputs, phase, memory=memory, host=machine.ram_bytes) for phase in phases.AFTER_TRAINING
    ]
    in_parts = any(placed is None or placed.offloaded_bytes for placed in later)
    return f"{needed / GIB:.1f} ({inputs.rows}, {checkpointing(inputs)}){IN_PARTS if in_parts else ''}"
