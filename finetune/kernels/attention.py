"""Causal attention over documents that lie end to end, each by itself: no mask, no square over the whole row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from finetune.kernels import native


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of the queries, heads of keys and values (a divisor), their width, and the factor of the scores."""

    heads: int
    key_heads: int
    width: int
    scale: float

    @property
    def sizes(self) -> list[int]:
        """Numbers of q, k and v of one token."""
        return [self.heads * self.width, self.key_heads * self.width, self.key_heads * self.width]


def attend(joint: Tensor, cosine: Tensor, sine: Tensor, *, borders: Tensor, shape: Shape, tiles: bool) -> Tensor:
    """Rotary positions and attention.

    Args:
        joint: q, k and v side by side, shape (tokens, (heads + 2 key_heads) width).
        cosine: Of the positions, shape (tokens, width); so is ``sine``.
        borders: Where documents begin, and where the last one ends, shape (documents + 1,).
        shape: Of the heads.
        tiles: Whether to use the kernels for AMX, which want bfloat16.

    Returns:
        Shape (tokens, heads width).
    """
    if tiles:
        result: Tensor = _Tiles.apply(joint, cosine, sine, borders.to(torch.int64), shape)
        return result
    q, k, v = (part.view(len(joint), -1, shape.width) for part in joint.split(shape.sizes, -1))
    q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
    return torch.cat(
        [_document(q[start:end], k[start:end], v[start:end], shape) for start, end in pairwise(borders.tolist())]
    )


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions as transformers computes them; ``x`` has the shape (tokens, heads, width)."""
    low, high = x.chunk(2, -1)
    return x * cosine[:, None] + torch.cat([-high, low], -1) * sine[:, None]


def _document(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """One document by torch's own kernels, shape (length, heads width)."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    grouped = shape.heads != shape.key_heads
    found = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=shape.scale, enable_gqa=grouped
    )
    return found[0].transpose(0, 1).reshape(-1, shape.heads * shape.width)


class _Tiles(torch.autograd.Function):
    """Keeps q, k and v as they came, the output, and one number for each query and head."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor, cosine: Tensor, sine: Tensor, borders: Tensor, shape: Shape) -> Tensor:
        out, log_sum = native.attention_forward(joint, cosine, sine, borders, shape)
        ctx.save_for_backward(joint, cosine, sine, borders, out, log_sum)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        joint, cosine, sine, borders, out, log_sum = ctx.saved_tensors
        return (
            native.attention_backward(joint, cosine, sine, borders, ctx.shape, out, d_out.contiguous(), log_sum),
            None,
            None,
            None,
            None,
        )
