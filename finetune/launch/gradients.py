"""Gradients of several processes as one: adapters are small, so all of them go in one message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def all_reduce_gradients(
    parameters: Iterable[nn.Parameter], figures: list[float], *, device: str = "cpu"
) -> list[float]:
    """Sums the gradients of all processes in place, in one message, and some figures in another.

    A parameter that no process has a gradient for keeps none: an optimizer leaves such a one alone.

    Args:
        parameters: Those that train, in the same order everywhere. Adapters are small, so all of them are sent at once.
        figures: Counted exactly up to 2^53.
        device: Where figures travel; the gradients stay where they are.

    Returns:
        The figures' sums.
    """
    import torch
    from torch import distributed

    sums = torch.tensor(figures, dtype=torch.float64, device=device)
    if figures:
        distributed.all_reduce(sums)
    learning = list(parameters)
    if learning:
        has = torch.tensor([float(p.grad is not None) for p in learning], device=learning[0].device)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).detach().float().flatten() for p in learning]
        flat = torch.cat([*parts, has])
        distributed.all_reduce(flat)
        *gradients, has = flat.split([*(p.numel() for p in learning), len(learning)])
        for parameter, gradient, present in zip(learning, gradients, has.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if present else None
    return [float(value) for value in sums.tolist()]


def spread(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every process the first one's values."""
    import torch
    from torch import distributed

    for parameter in parameters:
        with torch.no_grad():
            distributed.broadcast(parameter.data, src=0)
