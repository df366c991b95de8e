"""Chooses the next token of each row from its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.serve.engine import Sampling


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Returns the next token of one row.

    Args:
        logits: float32, shape (vocabulary,), on the CPU.
        sampling: Temperature, top_k and top_p, which are applied in this order.
        generator: The row's own, so that a seed gives the same answer whatever else is generated.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = torch.softmax(scaled, dim=-1)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the most probable token is always inside
        probabilities[places[outside]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def log_probabilities(logits: Tensor, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Returns a token's log-probability and the ``top`` best tokens with theirs, before temperature and top_p.

    Args:
        logits: float32, shape (vocabulary,).
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    best = logprobs.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return float(logprobs[token]), tuple(pairs)
