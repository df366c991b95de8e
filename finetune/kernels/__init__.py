"""Computes training steps faster: fused layers, native CPU kernels, loss on trained tokens only.

    fusion = apply_fusion(adapted, config.kernels, placement=placement, checkpointing="none")
    loss = fusion.loss(adapted, micro_batch)  # summed over the trained tokens
    with fusion.disabled():  # as transformers and peft compute it
        logits = adapted(**micro_batch).logits

Importing the package does not import torch.
"""

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
