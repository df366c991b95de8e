"""A frozen linear layer that keeps the codes of a quantized checkpoint, and computes the dense weight at each use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetune.quantization.checkpoint_format import CheckpointFormat
from finetune.quantization.unpack import CODES, dense_weight, without_plain_order


class PackedLinear(torch.nn.Linear):
    """A linear layer whose buffers are the checkpoint's tensors, under their own names and in their own dtypes.

    Gradients pass to the input; nothing is trained. ``weight`` is the tensor of codes, as in bitsandbytes' layers.

    Args:
        shape: Of the weight, (outputs, inputs).
        stored: How the weight is stored.
        tensors: Its tensors by the last segment of their names, on the meta device while a model is being built.
        bias: Of the layer, or None.
        compute_dtype: Of the products.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        stored: CheckpointFormat,
        tensors: Mapping[str, Tensor],
        *,
        bias: torch.nn.Parameter | None,
        compute_dtype: torch.dtype,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.stored, self.compute_dtype, self.codes_name = stored, compute_dtype, CODES[stored.packing]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(self.codes_name if name == "weight" else name)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the product, shape (..., outputs), in the dtype of the input."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y: Tensor = _Product.apply(input.to(self.compute_dtype), self, bias)
        return y.to(input.dtype)

    def dense(self) -> Tensor:
        """Returns the weight, shape (outputs, inputs), as the layer multiplies by it."""
        shape = (self.out_features, self.in_features)
        return dense_weight(self.parts(), self.stored, shape=shape, dtype=self.compute_dtype)

    def parts(self) -> dict[str, Tensor]:
        """Returns the checkpoint's tensors by name."""
        return dict(self.named_buffers(recurse=False))

    def drop_plain_order(self) -> None:
        """Drops the list of groups where it says nothing, so that no weight is gathered; see `without_plain_order`."""
        parts = self.parts()
        for name in parts.keys() - without_plain_order(parts, self.stored).keys():
            del self._buffers[name]


class _Product(torch.autograd.Function):
    """``x W' + b``; the dense weight is computed again in backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.dense(), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ ctx.layer.dense(), None, None
