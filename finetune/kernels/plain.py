"""The kernels in plain torch, for every device and dtype: the reference of the native ones."""

import torch
from torch import Tensor


def rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes ``weight * x / rms(x)`` as transformers rounds it.

    Args:
        x: Shape (..., width).
        weight: Shape (width,).
        eps: Added to the mean square.

    Returns:
        The result, and 1 / rms in float32, shape (...).
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * rstd[..., None]).to(x.dtype), rstd


def rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Computes the gradient of ``x``; the weight is frozen."""
    grad, normed = dy.float() * weight.float(), x.float() * rstd[..., None]
    return (rstd[..., None] * (grad - normed * (grad * normed).mean(-1, keepdim=True))).to(x.dtype)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """Computes ``silu(gate) * up``.

    Args:
        gate_up: gate and up concatenated, shape (rows, 2 width).
    """
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Computes the gradient of gate and up, concatenated."""
    gate, up = gate_up.float().chunk(2, -1)
    grad, sigmoid = dy.float(), torch.sigmoid(gate)
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, grad * gate * sigmoid], -1).to(gate_up.dtype)


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
