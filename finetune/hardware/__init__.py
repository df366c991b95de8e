"""Describes the machine and decides what follows from it.

``probe`` describes the machine, ``place`` decides where and how a run computes, with a reason for each choice::

    machine = probe(config.hardware)
    placement = place(machine, config)
    print(placement.device, placement.dtype, *placement.reasons)
"""

from finetune.hardware.place import Placement, place
from finetune.hardware.probe import HardwareConfig, Machine, probe

__all__ = ["HardwareConfig", "Machine", "Placement", "place", "probe"]
