"""Reads each distinct prompt of a batch once, however many answers are generated to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def shared_prefill(model: Any, ids: Tensor, mask: Tensor) -> Any:
    """Computes the keys and values of equal prompts once, all but those of the last token.

    Args:
        model: A causal language model without a peft wrapper.
        ids: Prompts, padded on the left, shape (rows, tokens).
        mask: 0 for padding and 1 for tokens, the same shape.

    Returns:
        A cache for ``generate``; None where all prompts differ, or the model has a cache that cannot be copied by row,
        such as the states of linear attention.
    """
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    tokens = ids.shape[1]
    distinct, row_of = torch.cat([ids, mask], 1).unique(dim=0, return_inverse=True)
    cache = DynamicCache(config=model.config)
    copied = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if len(distinct) == len(ids) or tokens < 2 or not copied:
        return None
    ids, mask = distinct[:, : tokens - 1], distinct[:, tokens:-1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as ``generate`` counts them
    model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(row_of)
    return cache
