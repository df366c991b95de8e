"""Causal attention over packed documents: no mask, no scores across documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from finetune.kernels import native


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Query heads, key/value heads (a divisor of them), head width, and what becomes of the scores.

    Attributes:
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; None leaves them.
        window: Tokens that a token sees, itself included; None for all before it.
    """

    heads: int
    key_heads: int
    width: int
    scale: float
    softcap: float | None = None
    window: int | None = None

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

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Computes causal attention within each document.

        Args:
            q: Shape (tokens, heads, width).
            k: Shape (tokens, key heads, width); the heads are a multiple of the key heads. ``v`` likewise.
            scale: Factor of the scores.
            window: Tokens that a token sees, itself included; None for all before it.
            softcap: See `AttentionShape`.

        Returns:
            Shape (tokens, heads, width).
        """
        if window is not None and window >= self.longest:
            window = None
        if self.varlen and softcap is None:
            left = -1 if window is None else window - 1
            return _varlen(q, k, v, self, scale=scale, window_size=(left, 0))
        # The backward pass of a split writes each gradient once; that of a slice fills a tensor of the whole size.
        parts = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        if softcap is not None:
            mine = [_capped_document(*part, scale=scale, window=window, softcap=softcap) for part in parts]
        else:
            mine = [_document(*part, scale=scale, window=window) for part in parts]
        return torch.cat(mine)


def attend(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    documents: Documents,
    shape: AttentionShape,
    tiles: bool,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Applies rotary positions and attention.

    Args:
        qkv: q, k and v concatenated, shape (tokens, (heads + 2 key_heads) width).
        rotary: Cosine and sine of the positions, shape (tokens, rotary width); None for a layer without.
        documents: Where each one lies.
        shape: Heads and their width.
        tiles: Whether to use the AMX kernels where they can compute this.
        change: Of q and k, shape (tokens, heads, width), before they are rotated.

    Returns:
        Shape (tokens, heads width).
    """
    if tiles and rotary is not None and _fits_tiles(qkv, rotary[0], documents, shape):
        if change is not None:
            q, k, v = _heads(qkv, shape)
            qkv = torch.cat([part.flatten(1) for part in (*change(q, k), v)], -1)
        result: Tensor = _AmxAttention.apply(qkv, *rotary, documents.starts.to(torch.int64), shape)
        return result
    q, k, v = _heads(qkv, shape)
    if change is not None:
        q, k = change(q, k)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    out = documents.attend(q, k, v, scale=shape.scale, window=shape.window, softcap=shape.softcap)
    return out.reshape(len(qkv), -1)


def _heads(qkv: Tensor, shape: AttentionShape) -> list[Tensor]:
    return [part.view(len(qkv), -1, shape.width) for part in qkv.split(shape.sizes, -1)]


def _fits_tiles(qkv: Tensor, cosine: Tensor, documents: Documents, shape: AttentionShape) -> bool:
    """Tells whether the AMX kernels compute this: bfloat16, whole heads rotated, neither window nor cap."""
    whole = cosine.shape[-1] == shape.width and cosine.dtype == qkv.dtype == torch.bfloat16
    return whole and shape.softcap is None and (shape.window is None or shape.window >= documents.longest)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Applies rotary positions as transformers computes them.

    Args:
        x: Shape (tokens, heads, width).
        cosine: Shape (tokens, rotary width); ``sine`` likewise. The other columns stay.
    """
    width = cosine.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cosine, sine), x[..., width:]], -1)
    low, high = x.chunk(2, -1)
    return (x * cosine[:, None] + torch.cat([-high, low], -1) * sine[:, None]).to(x.dtype)


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
    mask = _mask(q, window) if window is not None and len(q) > window else None
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def _capped_document(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float) -> Tensor:
    """Computes one document with capped scores, as transformers' eager attention does."""
    groups, hidden = q.shape[1] // k.shape[1], ~_mask(q, window)
    q, k, v = q.transpose(0, 1), *(part.transpose(0, 1).repeat_interleave(groups, 0) for part in (k, v))
    scores = torch.tanh(q @ k.transpose(1, 2) * (scale / softcap)) * softcap
    shares = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1, dtype=torch.float32).to(q.dtype)
    return (shares @ v).transpose(0, 1)


def _mask(q: Tensor, window: int | None) -> Tensor:
    """Returns which tokens of its document each token sees, shape (length, length)."""
    place = torch.arange(len(q), device=q.device)
    distance = place[:, None] - place
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


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
