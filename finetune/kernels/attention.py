"""Causal attention over packed documents: no mask, no scores across documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

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


@dataclass(slots=True)
class Documents:
    """The documents of a flat row.

    Attributes:
        starts: First token of each document, and the end of the last one, shape (documents + 1,), int32.
        longest: Tokens of the longest one.
        varlen: Whether `torch.nn.attention.varlen.varlen_attn` computes all of them in one call.
    """

    starts: Tensor
    longest: int
    varlen: bool = False
    _lengths: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Returns the tokens of each document. Their first use waits for the device; all layers share the answer."""
        if not self._lengths:
            self._lengths = self.starts.diff().tolist()
        return self._lengths

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None) -> Tensor:
        """Computes causal attention within each document.

        Args:
            q: Shape (tokens, heads, width).
            k: Shape (tokens, key heads, width); the heads are a multiple of the key heads. ``v`` likewise.
            scale: Factor of the scores.
            window: Tokens that a token sees, itself included; None for all before it.

        Returns:
            Shape (tokens, heads, width).
        """
        if window is not None and window >= self.longest:
            window = None
        if self.varlen:
            left = -1 if window is None else window - 1
            return _varlen(q, k, v, self, scale=scale, window_size=(left, 0))
        # The backward pass of a split writes each gradient once; that of a slice fills a tensor of the whole size.
        parts = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        return torch.cat([_document(*part, scale=scale, window=window) for part in parts])


def attend(
    qkv: Tensor, cosine: Tensor, sine: Tensor, *, documents: Documents, shape: AttentionShape, tiles: bool
) -> Tensor:
    """Applies rotary positions and attention.

    Args:
        qkv: q, k and v concatenated, shape (tokens, (heads + 2 key_heads) width).
        cosine: Of the positions, shape (tokens, width); ``sine`` likewise.
        documents: Where each one lies.
        shape: Heads and their width.
        tiles: Whether to use the AMX kernels, which need bfloat16.

    Returns:
        Shape (tokens, heads width).
    """
    if tiles:
        result: Tensor = _AmxAttention.apply(qkv, cosine, sine, documents.starts.to(torch.int64), shape)
        return result
    q, k, v = (part.view(len(qkv), -1, shape.width) for part in qkv.split(shape.sizes, -1))
    q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
    return documents.attend(q, k, v, scale=shape.scale).reshape(len(qkv), -1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Applies rotary positions as transformers computes them; ``x`` has the shape (tokens, heads, width)."""
    low, high = x.chunk(2, -1)
    return x * cosine[:, None] + torch.cat([-high, low], -1) * sine[:, None]


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, scale: float, window_size: tuple[int, int]
) -> Tensor:
    """Computes all documents in one call of FlashAttention, which is part of torch."""
    from torch.nn.attention import varlen

    starts, longest = documents.starts, documents.longest
    out = varlen.varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=window_size,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast(Tensor, out)


def _document(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Computes one document with torch's own kernels, shape (length, heads, width)."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    mask = None
    if window is not None and q.shape[2] > window:
        place = torch.arange(q.shape[2], device=q.device)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < window)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


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
