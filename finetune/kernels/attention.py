"""Causal attention over packed documents, one document at a time: no mask, no scores across documents."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from finetune.kernels import native


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Query heads, key/value heads (a divisor of them), head width, and the factor of the scores."""

    heads: int
    key_heads: int
    width: int
    scale: float

    @property
    def sizes(self) -> list[int]:
        """Returns the number of elements of q, k and v of one token."""
        return [self.heads * self.width, self.key_heads * self.width, self.key_heads * self.width]


def attend(qkv: Tensor, cosine: Tensor, sine: Tensor, *, starts: Tensor, shape: AttentionShape, tiles: bool) -> Tensor:
    """Applies rotary positions and attention.

    Args:
        qkv: q, k and v concatenated, shape (tokens, (heads + 2 key_heads) width).
        cosine: Of the positions, shape (tokens, width); ``sine`` likewise.
        starts: First token of each document, and the end of the last one, shape (documents + 1,).
        shape: Heads and their width.
        tiles: Whether to use the AMX kernels, which need bfloat16.

    Returns:
        Shape (tokens, heads width).
    """
    if tiles:
        result: Tensor = _AmxAttention.apply(qkv, cosine, sine, starts.to(torch.int64), shape)
        return result
    q, k, v = (part.view(len(qkv), -1, shape.width) for part in qkv.split(shape.sizes, -1))
    q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
    documents = [_document(q[start:end], k[start:end], v[start:end], shape) for start, end in pairwise(starts.tolist())]
    return torch.cat(documents)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Applies rotary positions as transformers computes them; ``x`` has the shape (tokens, heads, width)."""
    low, high = x.chunk(2, -1)
    return x * cosine[:, None] + torch.cat([-high, low], -1) * sine[:, None]


def _document(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    """Computes one document with torch's own kernels, shape (length, heads width)."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    grouped = shape.heads != shape.key_heads
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=shape.scale, enable_gqa=grouped
    )
    return out[0].transpose(0, 1).reshape(-1, shape.heads * shape.width)


class _AmxAttention(torch.autograd.Function):
    """Saves the unrotated q, k and v, the output, and one float for each query and head."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cosine: Tensor, sine: Tensor, starts: Tensor, shape: AttentionShape) -> Tensor:
        out, log_sum = native.attention_forward(qkv, cosine, sine, starts, shape)
        ctx.save_for_backward(qkv, cosine, sine, starts, out, log_sum)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cosine, sine, starts, out, log_sum = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_qkv = native.attention_backward(qkv, cosine, sine, starts, ctx.shape, out, d_out, log_sum)
        return d_qkv, None, None, None, None
