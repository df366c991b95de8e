"""Autograd functions for what lies between matrix products: norm, gated activation, head with cross entropy."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from finetune.kernels.forms import GateForm, NormForm

LOSS_ROWS = 256
"""Trained positions whose logits exist at one time: enough for a fast product, 25 MB at a vocabulary of 49,152."""


class RmsNorm(torch.autograd.Function):
    """RMSNorm that saves its input and one float per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: ModuleType, form: NormForm) -> Tensor:
        y, rstd = kernels.rms_forward(x, weight, eps, form)
        ctx.save_for_backward(x, weight, rstd)
        ctx.kernels, ctx.form = kernels, form
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        return ctx.kernels.rms_backward(dy.contiguous(), x, weight, rstd, ctx.form), None, None, None, None


@dataclass(frozen=True, slots=True)
class GatedActivation:
    """``activation(gate) * up`` in front of the down projection; gate and up are one tensor."""

    kernels: ModuleType
    form: GateForm

    def forward(self, gate_up: Tensor) -> Tensor:
        result: Tensor = self.kernels.gated_forward(gate_up, self.form)
        return result

    def backward(self, grad: Tensor, gate_up: Tensor) -> Tensor:
        result: Tensor = self.kernels.gated_backward(grad, gate_up, self.form)
        return result


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Head and cross entropy of trained positions, a chunk at a time; forward computes the gradient as well.

    Saves the gradient of the hidden states, shape (positions, width), instead of logits, shape (positions, vocabulary).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kernels: ModuleType, softcap: float | None = None
    ) -> Tensor:
        """Returns the summed loss in nats, float32.

        Args:
            hidden: Shape (positions, width).
            weight: Of the frozen head, shape (vocabulary, width).
            targets: Shape (positions,).
            kernels: The module that computes the cross entropy.
            softcap: Logits become ``softcap * tanh(logits / softcap)``; None leaves them.
        """
        return _token_losses(ctx, hidden, weight, targets, kernels, softcap).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream).to(gradient.dtype), None, None, None, None


class TokenLosses(FusedLinearCrossEntropy):
    """The loss of each position, shape (positions,), for objectives that weigh tokens differently."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kernels: ModuleType, softcap: float | None = None
    ) -> Tensor:
        return _token_losses(ctx, hidden, weight, targets, kernels, softcap)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream[:, None]).to(gradient.dtype), None, None, None, None


def _token_losses(
    ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kernels: ModuleType, softcap: float | None
) -> Tensor:
    """Returns the loss of each position and saves the gradient in ``ctx``."""
    positions, padded = len(hidden), -(-len(hidden) // LOSS_ROWS) * LOSS_ROWS  # all products have the same shape
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padded - positions))
    targets = torch.nn.functional.pad(targets, (0, padded - positions))
    gradient, losses = torch.empty_like(hidden), hidden.new_empty(padded, dtype=torch.float32)
    for start in range(0, padded, LOSS_ROWS):
        chunk = slice(start, start + LOSS_ROWS)
        logits = hidden[chunk] @ weight.t()
        if softcap is not None:
            bent = logits.div_(softcap).tanh_()
            logits = bent * softcap
        losses[chunk] = kernels.cross_entropy(logits, targets[chunk])
        if softcap is not None:
            logits.mul_(bent.square_().neg_().add_(1))
        torch.mm(logits, weight, out=gradient[chunk])
    ctx.save_for_backward(gradient[:positions])
    return losses[:positions]
