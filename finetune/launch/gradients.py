"""Sums gradients over processes in one message: adapters are small."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def all_reduce_gradients(
    parameters: Iterable[nn.Parameter], figures: list[float], *, device: str = "cpu"
) -> list[float]:
    """Sums the gradients of all processes in place, in one message, and some figures in another.

    A parameter without a gradient on any process gets none, because an optimizer skips such parameters.

    Args:
        parameters: Those that train, in the same order on every process.
        figures: Summed in float64, so counts are exact up to 2^53.
        device: Where figures are sent from; the gradients stay where they are.

    Returns:
        The sums of the figures.
    """
    import torch
    from torch import distributed

    sums = torch.tensor(figures, dtype=torch.float64, device=device)
    if figures:
        distributed.all_reduce(sums)
    trained = list(parameters)
    if trained:
        has_gradient = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).detach().float().flatten() for p in trained]
        flat = torch.cat([*parts, has_gradient])
        distributed.all_reduce(flat)
        *gradients, has_gradient = flat.split([*(p.numel() for p in trained), len(trained)])
        for parameter, gradient, present in zip(trained, gradients, has_gradient.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if present else None
    return [float(value) for value in sums.tolist()]


def broadcast_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Copies the values of the first process to all others."""
    import torch
    from torch import distributed

    for parameter in parameters:
        with torch.no_grad():
            distributed.broadcast(parameter.data, src=0)
