"""The kernels in plain torch, for every device and dtype: the reference of the native ones."""

import torch
from torch import Tensor

from finetune.kernels.forms import GateForm, NormForm

LARGEST_GATE = 100.0
"""Beyond it, a gate is 0 or 1 in float32; its cube would not be finite for ever."""


def rms_forward(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> tuple[Tensor, Tensor]:
    """Computes ``(weight + offset) * x / rms(x)`` as transformers rounds it.

    Args:
        x: Shape (..., width).
        weight: Shape (width,).
        eps: Added to the mean square.
        form: The offset, and when the result is rounded.

    Returns:
        The result, and 1 / rms in float32, shape (...).
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    normed = wide * rstd[..., None]
    if form.rounds_first:
        return weight * normed.to(x.dtype), rstd
    return (normed * (weight.float() + form.offset)).to(x.dtype), rstd


def rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: NormForm) -> Tensor:
    """Computes the gradient of ``x``; the weight is frozen."""
    grad, normed = dy.float() * (weight.float() + form.offset), x.float() * rstd[..., None]
    return (rstd[..., None] * (grad - normed * (grad * normed).mean(-1, keepdim=True))).to(x.dtype)


def gated_forward(gate_up: Tensor, form: GateForm) -> Tensor:
    """Computes ``activation(gate) * up``.

    Args:
        gate_up: gate and up concatenated, shape (rows, 2 width).
        form: The activation.
    """
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * torch.sigmoid(_exponent(gate, form)) * up).to(gate_up.dtype)


def gated_backward(dy: Tensor, gate_up: Tensor, form: GateForm) -> Tensor:
    """Computes the gradient of gate and up, concatenated."""
    gate, up = gate_up.float().chunk(2, -1)
    grad, sigmoid = dy.float(), torch.sigmoid(_exponent(gate, form))
    d_gate = grad * up * sigmoid * (1 + (1 - sigmoid) * _exponent(gate, form, power=3))
    return torch.cat([d_gate, grad * gate * sigmoid], -1).to(gate_up.dtype)


def _exponent(gate: Tensor, form: GateForm, *, power: int = 1) -> Tensor:
    """Computes the sigmoid's argument; with a ``power`` of 3, gate times its derivative."""
    if not form.cubic:
        return gate if form.linear == 1.0 else form.linear * gate
    near = gate.clamp(-LARGEST_GATE, LARGEST_GATE)
    return near * (form.linear + power * form.cubic * near.square())


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the loss of each row in nats, and replaces the logits by their gradient: softmax minus one at the
    target.

    Args:
        logits: Shape (rows, vocabulary).
        targets: Shape (rows,).

    Returns:
        Shape (rows,), float32.
    """
    probabilities = torch.log_softmax(logits.float(), -1)
    losses = -probabilities.gather(1, targets[:, None])[:, 0]
    probabilities.exp_().scatter_add_(1, targets[:, None], torch.full_like(losses, -1.0)[:, None])
    logits.copy_(probabilities)
    return losses
