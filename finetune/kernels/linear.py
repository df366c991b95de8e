"""LoRA layers that read the same input, as one product forward and one back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.quantization import dense, library_of


@dataclass(slots=True)
class FusedLinears:
    """Adapted linear layers with one input between them: q, k and v, or gate and up, or one alone.

    Attributes:
        layers: peft's LoRA layers; any but all of them may be plain linear ones.
        dtype: Numbers of the computation.
        cached: Their frozen weights below each other, shape (outputs, inputs); None computes them at each use.
        bias: Their biases, or None.
    """

    layers: list[Any]
    dtype: torch.dtype
    cached: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, layers: list[Any], *, cache: bool, dtype: torch.dtype) -> FusedLinears:
        biases = [base(layer).bias for layer in layers]
        absent = [torch.zeros(layer.out_features, device=base(layer).weight.device) for layer in layers]
        filled = [zeros if b is None else b.data for b, zeros in zip(biases, absent, strict=True)]
        bias = None if all(b is None for b in biases) else torch.cat(filled).to(dtype)
        made = cls(layers, dtype, None, bias)
        if cache:
            made.cached = made.weight()
            made._share()
        return made

    def weight(self) -> Tensor:
        """The frozen weights, shape (outputs, inputs)."""
        return (
            torch.cat([dense(base(layer), self.dtype) for layer in self.layers]) if self.cached is None else self.cached
        )

    def _share(self) -> None:
        """Weights that were never quantized become views of the cached ones, so that nothing is held twice."""
        assert self.cached is not None
        start = 0
        for layer in map(base, self.layers):
            end = start + layer.out_features
            if library_of(layer) is None:
                layer.weight.data = self.cached[start:end]
            start = end

    def __call__(self, x: Tensor, step: Step | None = None) -> Tensor:
        """The outputs side by side.

        Args:
            x: Shape (tokens, inputs), or what ``step`` makes that of.
            step: Computed before the product, and again on the way back, so that its result is not kept.

        Returns:
            Shape (tokens, outputs).
        """
        matrices = [matrix for part in self.adapters for matrix in (part.a, part.b)]
        result: Tensor = _Product.apply(x, self, step, *matrices)
        return result

    @property
    def adapters(self) -> list[Adapter]:
        """Of the adapted layers, with the columns of the output that they change; none where they are switched off."""
        found, start = [], 0
        for layer in self.layers:
            end = start + layer.out_features
            if is_adapted(layer) and not layer.disable_adapters:
                name = layer.active_adapters[0]
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                found.append(Adapter(slice(start, end), a, b, layer.scaling[name]))
            start = end
        return found

    @property
    def plain(self) -> bool:
        """Whether peft has to compute them itself just now: merged, or several adapters at once."""
        adapted = [layer for layer in self.layers if is_adapted(layer)]
        return any(layer.merged or len(layer.active_adapters) != 1 for layer in adapted)


class Step(Protocol):
    """A cheap step before a product."""

    def forward(self, raw: Tensor) -> Tensor: ...

    def backward(self, grad: Tensor, raw: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Adapter:
    """``scale * x a' b'`` is added to some columns of the output."""

    columns: slice
    a: Tensor
    b: Tensor
    scale: float


def is_adapted(layer: Any) -> bool:
    """Whether a layer carries a LoRA."""
    return hasattr(layer, "lora_A")


def base(layer: Any) -> Any:
    """The frozen linear layer inside."""
    return layer.get_base_layer() if is_adapted(layer) else layer


class _Product(torch.autograd.Function):
    """``x W' + b + s (x A') B'`` for each sibling. Only ``x A'`` and ``x``, or what ``x`` is made of, are kept."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, siblings: FusedLinears, step: Step | None, *matrices: Tensor) -> Tensor:
        x = step.forward(raw) if step else raw
        adapters = siblings.adapters
        y = torch.nn.functional.linear(x, siblings.weight(), siblings.bias)
        a = torch.cat(matrices[0::2]).to(x.dtype) if matrices else x.new_empty((0, x.shape[1]))
        scaled = [(part.b * part.scale).to(x.dtype) for part in adapters]
        inner = x @ a.t()
        for part, ranks, b in zip(adapters, _ranks(matrices), scaled, strict=True):
            y[:, part.columns].addmm_(inner[:, ranks], b.t())
        ctx.save_for_backward(raw, inner, a, *scaled)
        ctx.step, ctx.siblings, ctx.adapters = step, siblings, adapters
        ctx.ranks, ctx.formats = _ranks(matrices), [matrix.dtype for matrix in matrices]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        raw, inner, a, *scaled = ctx.saved_tensors
        x = ctx.step.forward(raw) if ctx.step else raw
        d_inner, grads = torch.empty_like(inner), list[Tensor]()
        for part, ranks, b in zip(ctx.adapters, ctx.ranks, scaled, strict=True):
            mine = dy[:, part.columns]
            d_inner[:, ranks] = mine @ b
            grads.append((inner[:, ranks].t() @ mine).t().float() * part.scale)
        d_a = d_inner.t() @ x
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.siblings.weight()
            dx.addmm_(d_inner, a)
            dx = ctx.step.backward(dx, raw) if ctx.step else dx
        found = [grad for ranks, d_b in zip(ctx.ranks, grads, strict=True) for grad in (d_a[ranks], d_b)]
        return dx, None, None, *(grad.to(kind) for grad, kind in zip(found, ctx.formats, strict=True))


def _ranks(matrices: tuple[Tensor, ...]) -> list[slice]:
    """For each adapter its columns of ``x A'``."""
    return [slice(*ends) for ends in pairwise(accumulate((a.shape[0] for a in matrices[0::2]), initial=0))]
