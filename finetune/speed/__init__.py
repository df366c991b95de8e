"""How a training step is computed: fused layers, kernels, loss on trained tokens. Importing it stays light."""

import importlib
from typing import TYPE_CHECKING, Any

from finetune.speed.config import SpeedConfig

if TYPE_CHECKING:
    from finetune.speed.quick import Quick, quicken

__all__ = ["Quick", "SpeedConfig", "quicken"]


def __getattr__(name: str) -> Any:
    if name in ("Quick", "quicken"):
        return getattr(importlib.import_module("finetune.speed.quick"), name)
    raise AttributeError(f"module 'finetune.speed' has no attribute {name!r}")
