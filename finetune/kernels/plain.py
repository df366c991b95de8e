"""The same steps in plain torch, for every device and number format: the reference that native kernels are held to."""

import torch
from torch import Tensor


def rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``weight * x / rms(x)`` as transformers rounds it.

    Args:
        x: Shape (..., width).
        weight: Shape (width,).

    Returns:
        The result, and 1 / rms in float32, shape (...).
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * rstd[..., None]).to(x.dtype), rstd


def rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of ``x``; the weight is frozen."""
    grad, normed = dy.float() * weight.float(), x.float() * rstd[..., None]
    return (rstd[..., None] * (grad - normed * (grad * normed).mean(-1, keepdim=True))).to(x.dtype)


def swiglu_forward(both: Tensor) -> Tensor:
    """``silu(gate) * up``.

    Args:
        both: gate and up side by side, shape (rows, 2 width).
    """
    gate, up = both.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(both.dtype)


def swiglu_backward(dy: Tensor, both: Tensor) -> Tensor:
    """The gradient of gate and up, side by side."""
    gate, up = both.float().chunk(2, -1)
    grad, sigmoid = dy.float(), torch.sigmoid(gate)
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, grad * gate * sigmoid], -1).to(both.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each row in nats; the logits become their gradient, softmax minus one at the target.

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
