"""What this machine is, and what follows from it: `probe` looks, `place` decides."""

from finetune.hardware.backends import LIMITS, Limit
from finetune.hardware.place import Placement, place
from finetune.hardware.probe import Gpu, HardwareConfig, Machine, probe

__all__ = ["LIMITS", "Gpu", "HardwareConfig", "Limit", "Machine", "Placement", "place", "probe"]
