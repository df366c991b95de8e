"""LoRA layers that read the same input, computed as one product forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.quantization.backends import backend_of, dense


class Activation(Protocol):
    """A cheap function in front of a product, computed again in backward so that its result is not saved."""

    def forward(self, raw: Tensor) -> Tensor: ...

    def backward(self, grad: Tensor, raw: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LoraBranch:
    """Adds ``scale * dropout(x) A' B'`` to some columns of the output."""

    columns: slice
    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(slots=True)
class FusedLinears:
    """Linear layers with one input: q, k and v, or gate and up, or a single layer.

    Attributes:
        layers: peft's LoRA layers or plain linear layers.
        dtype: Dtype of the computation.
        cached: Their frozen weights concatenated, shape (outputs, inputs); None computes them at each use.
        bias: Their biases, or None.
    """

    layers: list[Any]
    dtype: torch.dtype
    cached: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, layers: list[Any], *, cache: bool, dtype: torch.dtype) -> FusedLinears:
        biases = [base_layer(layer).bias for layer in layers]
        zeros = [torch.zeros(layer.out_features, device=base_layer(layer).weight.device) for layer in layers]
        filled = [zero if bias is None else bias.data for bias, zero in zip(biases, zeros, strict=True)]
        bias = None if all(bias is None for bias in biases) else torch.cat(filled).to(dtype)
        fused = cls(layers, dtype, None, bias)
        if cache:
            fused.cached = fused.weight()
            fused._share_cached_weights()
        return fused

    def alone(self) -> list[FusedLinears]:
        """Returns each layer alone, with its part of the cached weights."""
        sizes = [layer.out_features for layer in self.layers]
        weights: Sequence[Tensor | None] = [None] * len(sizes) if self.cached is None else self.cached.split(sizes)
        biases: Sequence[Tensor | None] = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        parts = zip(self.layers, weights, biases, strict=True)
        return [FusedLinears([layer], self.dtype, weight, bias) for layer, weight, bias in parts]

    def weight(self) -> Tensor:
        """Returns the frozen weights, shape (outputs, inputs)."""
        if self.cached is not None:
            return self.cached
        return torch.cat([dense(base_layer(layer), self.dtype) for layer in self.layers])

    def _share_cached_weights(self) -> None:
        """Makes unquantized weights views of the cached ones, so that no weight is stored twice."""
        assert self.cached is not None
        start = 0
        for layer in map(base_layer, self.layers):
            end = start + layer.out_features
            if backend_of(layer) is None:
                layer.weight.data = self.cached[start:end]
            start = end

    def __call__(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """Returns the concatenated outputs, shape (tokens, outputs).

        Args:
            x: Shape (tokens, inputs), or the input of ``activation``.
            activation: Computed before the product, and again in backward.
        """
        matrices = [matrix for branch in self.branches for matrix in (branch.a, branch.b)]
        result: Tensor = _FusedProduct.apply(x, self, activation, *matrices)
        return result

    @property
    def branches(self) -> list[LoraBranch]:
        """Returns the active adapters with the output columns that they change."""
        branches, start = [], 0
        for layer in self.layers:
            end = start + layer.out_features
            if is_adapted(layer) and not layer.disable_adapters:
                name = layer.active_adapters[0]
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                dropout = layer.lora_dropout[name]
                rate = float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
                branches.append(LoraBranch(slice(start, end), a, b, layer.scaling[name], rate))
            start = end
        return branches

    @property
    def needs_peft(self) -> bool:
        """Returns whether only peft can compute the layers at the moment: merged, or several active adapters."""
        adapted = [layer for layer in self.layers if is_adapted(layer)]
        return any(layer.merged or len(layer.active_adapters) != 1 for layer in adapted)


def is_adapted(layer: Any) -> bool:
    """Returns whether a layer carries a LoRA adapter."""
    return hasattr(layer, "lora_A")


def base_layer(layer: Any) -> Any:
    """Returns the frozen linear layer inside a LoRA layer."""
    return layer.get_base_layer() if is_adapted(layer) else layer


def dropout_mask(x: Tensor, *, rate: float, seed: int | None) -> Tensor | None:
    """Makes the mask that a seed stands for: 0 with the probability ``rate``, else ``1 / (1 - rate)``; None without.

    It is made again in the backward pass, which is cheaper than to keep one for each adapter.
    """
    if seed is None:
        return None
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - rate, generator=generator).div_(1 - rate)


def draw_seed(rate: float) -> int | None:
    """Draws a seed from torch's generator of the CPU, which checkpointing and checkpoints restore; None without
    dropout."""
    return int(torch.randint(2**62, ())) if rate else None


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


class _FusedProduct(torch.autograd.Function):
    """``x W' + b + s (x A') B'`` for each layer. Saves only ``x A'`` and ``x``, or the input of the activation."""

    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, linears: FusedLinears, activation: Activation | None, *matrices: Tensor
    ) -> Tensor:
        x = activation.forward(raw) if activation else raw
        branches = linears.branches
        y = torch.nn.functional.linear(x, linears.weight(), linears.bias)
        a = torch.cat(matrices[0::2]).to(x.dtype) if matrices else x.new_empty((0, x.shape[1]))
        scaled = [(branch.b * branch.scale).to(x.dtype) for branch in branches]
        slices, seeds = _rank_slices(matrices), [draw_seed(branch.dropout) for branch in branches]
        if any(seed is not None for seed in seeds):
            masks = (
                dropout_mask(x, rate=branch.dropout, seed=seed) for branch, seed in zip(branches, seeds, strict=True)
            )
            parts = [_masked(x, mask) @ a[ranks].t() for ranks, mask in zip(slices, masks, strict=True)]
            inner = torch.cat(parts, -1)
        else:
            inner = x @ a.t()
        for branch, ranks, b in zip(branches, slices, scaled, strict=True):
            y[:, branch.columns].addmm_(inner[:, ranks], b.t())
        ctx.save_for_backward(raw, inner, a, *scaled)
        ctx.activation, ctx.linears, ctx.branches = activation, linears, branches
        ctx.ranks, ctx.seeds, ctx.dtypes = slices, seeds, [matrix.dtype for matrix in matrices]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        raw, inner, a, *scaled = ctx.saved_tensors
        x = ctx.activation.forward(raw) if ctx.activation else raw
        d_inner, d_bs = torch.empty_like(inner), list[Tensor]()
        for branch, ranks, b in zip(ctx.branches, ctx.ranks, scaled, strict=True):
            dy_branch = dy[:, branch.columns]
            d_inner[:, ranks] = dy_branch @ b
            d_bs.append((inner[:, ranks].t() @ dy_branch).t().float() * branch.scale)
        drops = any(seed is not None for seed in ctx.seeds)
        d_a = torch.empty_like(a) if drops else d_inner.t() @ x
        dx = dy @ ctx.linears.weight() if ctx.needs_input_grad[0] else None
        for branch, ranks, seed in zip(ctx.branches, ctx.ranks, ctx.seeds, strict=True) if drops else ():
            mask = dropout_mask(x, rate=branch.dropout, seed=seed)
            d_a[ranks] = d_inner[:, ranks].t() @ _masked(x, mask)
            if dx is not None:
                dx += _masked(d_inner[:, ranks] @ a[ranks], mask)
        if dx is not None:
            if not drops:
                dx.addmm_(d_inner, a)
            dx = ctx.activation.backward(dx, raw) if ctx.activation else dx
        grads = [grad for ranks, d_b in zip(ctx.ranks, d_bs, strict=True) for grad in (d_a[ranks], d_b)]
        return dx, None, None, *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))


def _rank_slices(matrices: tuple[Tensor, ...]) -> list[slice]:
    """Returns the columns of ``x A'`` that belong to each adapter."""
    return [slice(*ends) for ends in pairwise(accumulate((a.shape[0] for a in matrices[0::2]), initial=0))]
