"""How a training step is computed: fused layers, kernels, loss on trained tokens. Importing it stays light."""

import importlib
from typing import TYPE_CHECKING, Any

from finetune.kernels.config import KernelsConfig

if TYPE_CHECKING:
    from finetune.kernels.fusion import Fusion, apply_fusion

__all__ = ["Fusion", "KernelsConfig", "apply_fusion"]


def __getattr__(name: str) -> Any:
    if name in ("Fusion", "apply_fusion"):
        return getattr(importlib.import_module("finetune.kernels.fusion"), name)
    raise AttributeError(f"module 'finetune.kernels' has no attribute {name!r}")
