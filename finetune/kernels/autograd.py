"""The steps between products as autograd functions: norm, gated activation, head with loss."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LOSS_ROWS = 256
"""Trained positions whose logits are alive at one time: enough for a fast product, 25 MB at a vocabulary of 49,152."""


class RmsNorm(torch.autograd.Function):
    """Keeps the input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: ModuleType) -> Tensor:
        y, rstd = kernels.rms_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        return ctx.kernels.rms_backward(dy.contiguous(), x, weight, rstd), None, None, None


@dataclass(frozen=True, slots=True)
class SwiGlu:
    """``silu(gate) * up`` before the product that reads it; gate and up lie side by side as the product before wrote them."""

    kernels: ModuleType

    def forward(self, raw: Tensor) -> Tensor:
        result: Tensor = self.kernels.swiglu_forward(raw)
        return result

    def backward(self, grad: Tensor, raw: Tensor) -> Tensor:
        result: Tensor = self.kernels.swiglu_backward(grad, raw)
        return result


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Head and cross entropy of trained positions only, a few at a time; their gradient is taken at once.

    Keeps the gradient of the hidden states, shape (positions, width), instead of logits, shape (positions, vocabulary).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kernels: ModuleType) -> Tensor:
        """
        Args:
            hidden: Shape (positions, width).
            weight: Of the frozen head, shape (vocabulary, width).
            targets: Shape (positions,).

        Returns:
            Summed loss in nats, float32.
        """
        return token_losses(ctx, hidden, weight, targets, kernels).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream).to(gradient.dtype), None, None, None


class TokenLosses(FusedLinearCrossEntropy):
    """The same for objectives that weigh tokens differently: the loss of each position, shape (positions,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kernels: ModuleType) -> Tensor:
        return token_losses(ctx, hidden, weight, targets, kernels)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream[:, None]).to(gradient.dtype), None, None, None


def token_losses(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kernels: ModuleType) -> Tensor:
    """The loss of each position; its gradient goes into ``ctx``."""
    positions, filled = len(hidden), -(-len(hidden) // LOSS_ROWS) * LOSS_ROWS  # products of one shape only
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, filled - positions))
    targets = torch.nn.functional.pad(targets, (0, filled - positions))
    gradient, losses = torch.empty_like(hidden), hidden.new_empty(filled, dtype=torch.float32)
    for start in range(0, filled, LOSS_ROWS):
        part = slice(start, start + LOSS_ROWS)
        logits = hidden[part] @ weight.t()
        losses[part] = kernels.cross_entropy(logits, targets[part])
        torch.mm(logits, weight, out=gradient[part])
    ctx.save_for_backward(gradient[:positions])
    return losses[:positions]
