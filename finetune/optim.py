"""Optimizer and schedule: what the user may name, and what it becomes where there is no paging."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

UNPAGED = {
    "paged_adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "adamw_torch",
    "paged_lion_8bit": "lion_8bit",
    "paged_lion_32bit": "lion_32bit",
}
"""The same optimizer with its states in ordinary memory."""

OPTIMIZERS = (*UNPAGED, *UNPAGED.values())
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""Our names to transformers'; with a warmup of 0, ``constant_with_warmup`` is constant."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """How the adapter's weights move."""

    name: str
    """transformers' name, e.g. ``paged_adamw_8bit``."""

    learning_rate: float
    """Peak step size."""

    schedule: str
    """``constant``, ``linear`` or ``cosine``: how the rate falls after warmup."""

    warmup: float
    """Share of the steps in which the rate rises from 0, 0 to below 1."""

    weight_decay: float
    """Pull towards 0 on each step, decoupled as in AdamW."""

    max_grad_norm: float
    """Gradients are scaled down to this norm where they exceed it."""

    beta1: float
    """Memory of the gradient's mean."""

    beta2: float
    """Memory of the gradient's square."""

    def problems(self) -> Iterator[str]:
        if self.name not in OPTIMIZERS:
            yield f"optim.name must be one of {', '.join(OPTIMIZERS)}; got {self.name!r}"
        if self.learning_rate <= 0:
            yield f"optim.learning_rate must be positive, or nothing moves; got {self.learning_rate}"
        if self.schedule not in SCHEDULES:
            yield f"optim.schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}"
        if not 0 <= self.warmup < 1:
            yield f"optim.warmup is a share of the steps, at least 0 and below 1; got {self.warmup}"
        if self.max_grad_norm <= 0:
            yield f"optim.max_grad_norm must be positive; got {self.max_grad_norm}"
        for key, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                yield f"optim.{key} must be at least 0 and below 1; got {beta}"


def state_bytes(optimizer: Any) -> int:
    """Bytes that an optimizer keeps between steps."""
    import torch

    inner = getattr(optimizer, "optimizer", optimizer)
    tensors = (value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
