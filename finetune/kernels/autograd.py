"""Autograd functions for what lies between matrix products: norm, SwiGLU, head with cross entropy."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LOSS_ROWS = 256
"""Trained positions whose logits exist at one time: enough for a fast product, 25 MB at a vocabulary of 49,152."""


class RmsNorm(torch.autograd.Function):
    """RMSNorm that saves its input and one float per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: ModuleType) -> Tensor:
        y, rstd = kernels.rms_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        return ctx.kernels.rms_backward(dy.contiguous(), x, weight, rstd), None, None, None


@dataclass(frozen=True, slots=True)
class SwiGlu:
    """``silu(gate) * up`` in front of the down projection; gate and up are one tensor."""

    kernels: ModuleType

    def forward(self, gate_up: Tensor) -> Tensor:
        result: Tensor = self.kernels.swiglu_forward(gate_up)
        return result

    def backward(self, grad: Tensor, gate_up: Tensor) -> Tensor:
        result: Tensor = self.kernels.swiglu_backward(grad, gate_up)
        return result


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Head and cross entropy of trained positions, a chunk at a time; forward computes the gradient as well.

    Saves the gradient of the hidden states, shape (positions, width), instead of logits, shape (positions, vocabulary).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kernels: ModuleType) -> Tensor:
        """Returns the summed loss in nats, float32.

        Args:
            hidden: Shape (positions, width).
            weight: Of the frozen head, shape (vocabulary, width).
            targets: Shape (positions,).
            kernels: The module that computes the cross entropy.
        """
        return _token_losses(ctx, hidden, weight, targets, kernels).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream).to(gradient.dtype), None, None, None


class TokenLosses(FusedLinearCrossEntropy):
    """The loss of each position, shape (positions,), for objectives that weigh tokens differently."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kernels: ModuleType) -> Tensor:
        return _token_losses(ctx, hidden, weight, targets, kernels)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream[:, None]).to(gradient.dtype), None, None, None


def _token_losses(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kernels: ModuleType) -> Tensor:
    """Returns the loss of each position and saves the gradient in ``ctx``."""
    positions, padded = len(hidden), -(-len(hidden) // LOSS_ROWS) * LOSS_ROWS  # all products have the same shape
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padded - positions))
    targets = torch.nn.functional.pad(targets, (0, padded - positions))
    gradient, losses = torch.empty_like(hidden), hidden.new_empty(padded, dtype=torch.float32)
    for start in range(0, padded, LOSS_ROWS):
        chunk = slice(start, start + LOSS_ROWS)
        logits = hidden[chunk] @ weight.t()
        losses[chunk] = kernels.cross_entropy(logits, targets[chunk])
        torch.mm(logits, weight, out=gradient[chunk])
    ctx.save_for_backward(gradient[:positions])
    return losses[:positions]
