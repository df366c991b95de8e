"""What torch's varlen attention computes, written out for a CPU."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def fake_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Computes by the formula, and refuses what the real one refuses."""
    assert cu_seq_k is not None
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.is_contiguous()
    assert max_q == max_k == int(cu_seq_q.diff().max())
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    found = []
    for start, end in pairwise(cu_seq_q.tolist()):
        q, k, v = (part[start:end] for part in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = window_size
        unseen = (distance < -right) | ((distance > left) if left >= 0 else False)
        scores = torch.einsum("qhw,khw->hqk", q, k) * (scale or query.shape[-1] ** -0.5)
        found.append(torch.einsum("hqk,khw->qhw", scores.masked_fill(unseen, -torch.inf).softmax(-1), v))
    return torch.cat(found)
