"""Quantization-aware training: layers that multiply by the NF4 rounding of the sum of weight and adapter.

    quantize(model, config)  # before the adapter is attached
    round_sums(adapted)  # after it was

The base stays dense and frozen. Each pass rounds ``W + s B A`` to the bit as ``export=bitsandbytes`` does, so that
rounding the merged model gives exactly the weights that were trained. The gradient passes the rounding as if it were
the identity (the straight-through estimator, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.quantization.config import PackedWeight, QuantizationConfig
from finetune.quantization.skip_modules import is_skipped

BLOCK = 64
"""Weights that share a constant: bitsandbytes' default, which exports write."""

Update = tuple[Tensor, Tensor, float]
"""A, shape (rank, inputs), B, shape (outputs, rank), and the factor of their product."""


class RoundedLinear(torch.nn.Linear):
    """A frozen linear layer that multiplies by the rounding of its weight, or of its weight plus low-rank updates.

    Attributes:
        rounds_constants: ``quantization.double``.
        rounded: The last rounding, kept until the updates change: the updates, the codes, and their constants.
    """

    rounds_constants: bool
    rounded: tuple[list[Update], Tensor, Any] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Returns the product with the rounded weight, shape (..., outputs), in the dtype of the input."""
        return self.product(input, [])

    def product(self, x: Tensor, updates: Sequence[Update]) -> Tensor:
        """Returns the product with the rounded sum, as a bitsandbytes layer computes it. Gradients pass to ``x``."""
        from bitsandbytes import matmul_4bit

        codes, constants = self.codes(updates)
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = matmul_4bit(x.to(dtype), codes, constants, bias=bias)
        return y.to(x.dtype)

    @torch.no_grad()
    def codes(self, updates: Sequence[Update]) -> tuple[Tensor, Any]:
        """Returns bitsandbytes' codes of the sum, and their constants.

        The updates are compared by value, since bitsandbytes' optimizers change them behind torch's version counters.
        """
        if self.rounded is None or not _equal(self.rounded[0], updates):
            kept = [(a.detach().clone(), b.detach().clone(), scale) for a, b, scale in updates]
            total = self.weight.double()
            for a, b, scale in updates:
                total = add_update(total, a, b, scale)
            self.rounded = kept, *round_nf4(total.to(self.weight.dtype), double=self.rounds_constants)
        return self.rounded[1:]


def add_update(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Adds ``scale B A`` to a float64 weight, or to some of its rows with those of B, in place.

    In float64 the order of the sum does not show after rounding to 32 or 16 bits, so a training step on all threads and
    a merge in pieces give the same weights.
    """
    return weight.addmm_(b.double(), a.double(), alpha=scale)


def round_nf4(weight: Tensor, *, double: bool) -> tuple[Tensor, Any]:
    """Returns the codes and constants that bitsandbytes' ``quantize_4bit`` returns.

    On a CPU, comparisons take the place of its binary search: 4 ns a weight instead of 28 on two cores.

    Source: bitsandbytes 0.50.2, functional.py (quantize_4bit) and backends/default/ops.py.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

    if weight.device.type != "cpu":
        rounded: tuple[Tensor, Any] = quantize_4bit(
            weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=double
        )
        return rounded
    book = get_4bit_type("nf4", device="cpu")
    blocks = weight.float().view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    blocks = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    codes = torch.zeros(blocks.shape, dtype=torch.uint8)
    for bound in ((book[:-1] + book[1:]) / 2).tolist():
        codes += blocks > bound
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).view(-1, 1)
    settings = {"shape": weight.shape, "code": book, "blocksize": BLOCK, "quant_type": "nf4", "dtype": weight.dtype}
    if not double:
        return packed, QuantState(absmax, **settings)
    offset = absmax.mean()
    constants, nested = quantize_blockwise(absmax - offset, blocksize=256)
    return packed, QuantState(constants, offset=offset, state2=nested, **settings)


def _equal(kept: Sequence[Update], updates: Sequence[Update]) -> bool:
    return len(kept) == len(updates) and all(
        scale == new_scale and torch.equal(a, new_a) and torch.equal(b, new_b)
        for (a, b, scale), (new_a, new_b, new_scale) in zip(kept, updates, strict=True)
    )


def quantize(model: torch.nn.Module, config: QuantizationConfig, *, dtype: str) -> None:
    """Makes the linear layers of a dense model round their weights, which stay in the dtype of the model.

    Raises:
        ModelError: Blocks do not divide a layer.
    """
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is torch.nn.Linear and not is_skipped(name, config.skip_modules)
    }
    uneven = sorted({name.rpartition(".")[2] for name, layer in layers.items() if layer.in_features % BLOCK})
    if uneven:
        raise ModelError(
            f"quantization=qat: the inputs of {', '.join(uneven)} are not a multiple of {BLOCK}, the weights that "
            f"share a constant; leave these layers unquantized with quantization.skip_modules=[{','.join(uneven)}]"
        )
    for layer in layers.values():
        layer.__class__ = RoundedLinear
        layer.rounds_constants = config.double


def round_sums(adapted: Any) -> None:
    """Makes adapted layers round the sum of weight and adapter; a model without such layers stays as it is."""
    for layer in adapted.modules():
        if hasattr(layer, "lora_A") and isinstance(layer.get_base_layer(), RoundedLinear):
            layer.forward = partial(_rounded_forward, layer)


def _rounded_forward(layer: Any, x: Tensor) -> Tensor:
    """Computes a LoRA layer of peft from the rounded sum.

    The gradients of A and B are those of ``x (W + s B A)'`` and do not need that of the dense weight: they come from
    the plain LoRA product, whose value is subtracted again.
    """
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    updates = [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]
    y: Tensor = layer.get_base_layer().product(x, updates)
    for a, b, scale in updates if torch.is_grad_enabled() else ():
        path = torch.nn.functional.linear(torch.nn.functional.linear(x.detach().to(a.dtype), a), b) * scale
        y = y + (path - path.detach()).to(y.dtype)
    return y


def dense(layer: RoundedLinear) -> Tensor:
    """Returns the rounded weight, shape (outputs, inputs), without an adapter."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(*layer.codes([]))
    return weight


def packed_weight(layer: RoundedLinear) -> PackedWeight:
    """Returns the layer's weight, which is not packed: it is what memory holds."""
    return PackedWeight(shape=layer.weight.shape, codes=layer.weight.data, constants={}, layout="qat")
