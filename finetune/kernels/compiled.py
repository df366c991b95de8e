"""The kernels in plain torch, compiled by torch for this device at their first use: Triton on a GPU, C++ on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from finetune.files import first_error_line
from finetune.kernels import plain
from finetune.kernels.forms import GateForm, NormForm

VARIANTS = 64
"""Programs that a function may have, one for each width, dtype and form of a model. torch's limit of 8 is for code
whose number of variants has no bound."""


def rms_forward(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> tuple[Tensor, Tensor]:
    """Computes `plain.rms_forward`."""
    normed, rstd = _compiled(plain.rms_forward)(_any_rows(x), weight, eps, form)
    return normed, rstd


def rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: NormForm) -> Tensor:
    """Computes `plain.rms_backward`."""
    gradient: Tensor = _compiled(plain.rms_backward)(_any_rows(dy), _any_rows(x), weight, _any_rows(rstd, 0), form)
    return gradient


def gated_forward(gate_up: Tensor, form: GateForm) -> Tensor:
    """Computes `plain.gated_forward`."""
    result: Tensor = _compiled(plain.gated_forward)(_any_rows(gate_up), form)
    return result


def gated_backward(dy: Tensor, gate_up: Tensor, form: GateForm) -> Tensor:
    """Computes `plain.gated_backward`."""
    gradient: Tensor = _compiled(plain.gated_backward)(_any_rows(dy), _any_rows(gate_up), form)
    return gradient


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes `plain.cross_entropy`, logits replaced by their gradient as there."""
    losses: Tensor = _compiled(plain.cross_entropy)(_any_rows(logits), _any_rows(targets, 0))
    return losses


@cache
def obstacle(device: str) -> str | None:
    """Returns why torch cannot compile for a device; None where it can, which is tried."""
    try:
        rms_forward(torch.ones(2, 8, device=device), torch.ones(8, device=device), 1e-6, NormForm())
    except (RuntimeError, OSError) as error:
        return f"torch cannot compile here: {first_error_line(error)}"
    return None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(function, fullgraph=True, dynamic=False)  # widths are fixed; `_any_rows` marks the rest


def _any_rows(tensor: Tensor, widths: int = 1) -> Tensor:
    """Marks all dimensions but the last ``widths`` as different in each step, so that one program serves them all."""
    for dimension in range(tensor.ndim - widths):
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    return tensor
