"""Losses and figures of the objectives that compare a chosen with a rejected answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.objectives import OBJECTIVES
from finetune.train.preference import chosen, rejected
from finetune.train.preference_config import PreferenceConfig

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.scores import Difference, Interval

FIGURES = ("reward_margin", "reward_accuracy", "chosen_logprob", "rejected_logprob", "chosen_logprob_per_token")


def answer_scores(name: str, policy: Tensor, reference: Tensor | None, answer_tokens: Tensor) -> Tensor:
    """Computes what an objective compares, shape (2, pairs): chosen, rejected.

    Args:
        name: ``train.objective``.
        policy: Log-probabilities under the policy, shape (2, pairs).
        reference: Likewise under the reference; None for objectives without one.
        answer_tokens: Trained tokens of each answer, shape (2 pairs,).

    Source: arXiv 2305.18290 (dpo: the log of the ratio), 2401.08417 (cpo: the log-probability), 2405.14734 (simpo: its
    mean over the tokens), 2403.07691 (orpo: the log of the odds of that mean's probability).
    """
    if reference is not None:
        return policy - reference
    if not OBJECTIVES[name].per_token:
        return policy
    means = policy / answer_tokens.view(2, -1)
    return means - log1mexp(means) if name == "orpo" else means


def log1mexp(values: Tensor) -> Tensor:
    """Computes log(1 - e^x) of values below 0 without cancellation; those above -1e-7 count as that.

    Source: Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    import torch

    border = -math.log(2)
    near = torch.log(-torch.expm1(values.clamp(border, -1e-7)))
    return torch.where(values > border, near, torch.log1p(-torch.exp(values.clamp(max=border))))


def pair_losses(scores: Tensor, answer_tokens: Tensor, config: PreferenceConfig, *, name: str = "dpo") -> Tensor:
    """Computes the loss of each pair, shape (pairs,), without the likelihood term.

    Args:
        scores: From `answer_scores`.
        answer_tokens: Trained tokens of each answer, shape (2 pairs,); ``ipo`` divides by them, as its authors do.
        config: Form and strength.
        name: ``train.objective``; ``orpo`` weighs its loss by beta, the others scale the scores by it.

    Source: arXiv 2305.18290 (sigmoid, smoothed as in its authors' note on noisy labels), 2310.12036 (ipo), 2305.10425
    (hinge), 2405.14734 (the margin), 2403.07691 (orpo).
    """
    from torch.nn.functional import logsigmoid

    if name == "orpo":
        return -config.beta * logsigmoid(scores[0] - scores[1])
    if config.loss == "ipo":
        per_token = scores / answer_tokens.view(2, -1)
        return (per_token[0] - per_token[1] - 1 / (2 * config.beta)) ** 2
    logits = config.beta * (scores[0] - scores[1]) - config.margin
    if config.loss == "hinge":
        return (1 - logits).relu()
    smoothing = config.label_smoothing
    return -logsigmoid(logits) * (1 - smoothing) - logsigmoid(-logits) * smoothing


def rewards(
    name: str, policy: Tensor, reference: Tensor | None, answer_tokens: Tensor, config: PreferenceConfig
) -> Tensor:
    """Returns beta times the log-probability, less the reference's where there is one, shape (2, pairs).

    Args:
        name: ``train.objective``; ``orpo`` and ``simpo`` take means over the tokens.
        policy: Log-probabilities under the policy, shape (2, pairs).
        reference: Likewise under the reference, or None.
        answer_tokens: Trained tokens of each answer, shape (2 pairs,).
        config: Holds beta.
    """
    values = policy if reference is None else policy - reference
    return config.beta * (values / answer_tokens.view(2, -1) if OBJECTIVES[name].per_token else values).detach()


def figures(policy: Tensor, rewards: Tensor, answer_tokens: Tensor) -> Tensor:
    """Sums the logged figures over pairs; returns the number of pairs and then `FIGURES`, shape (6,).

    Args:
        policy: Log-probabilities under the policy, shape (2, pairs).
        rewards: From `rewards`.
        answer_tokens: Trained tokens of each answer, shape (2 pairs,).
    """
    import torch

    policy, margins = policy.detach(), rewards[0] - rewards[1]
    sums = [torch.ones_like(margins).sum(), margins.sum(), (margins > 0).float().sum(), *policy.sum(1)]
    return torch.stack([*sums, (policy[0] / answer_tokens.view(2, -1)[0]).sum()]).double().cpu()


def named(sums: Tensor, *, prefix: str) -> dict[str, float]:
    """Returns the means over pairs by name, e.g. ``train/reward_margin``."""
    pairs, *rest = sums.tolist()
    return {f"{prefix}/{name}": value / pairs for name, value in zip(FIGURES, rest, strict=True)}


def held_out_figures(
    model: Any, pairs: Sequence[dict[str, Any]], config: PreferenceConfig, *, name: str, batch_tokens: int
) -> dict[str, float]:
    """Computes the mean loss of held-out pairs, as ``eval_loss``, and the logged figures, two of them with intervals.

    Args:
        model: The peft model.
        pairs: From `held_out_pairs`, at least one.
        config: Form and strength.
        name: ``train.objective``.
        batch_tokens: Padded tokens per forward pass.
    """
    import torch

    from finetune.inference.bootstrap import RESAMPLES, Bootstrap, mean_of
    from finetune.inference.losses import row_losses

    answers, reference = [*map(chosen, pairs), *map(rejected, pairs)], None
    adapted = row_losses(model, answers, batch_tokens=batch_tokens)
    policy = torch.tensor([-row.loss for row in adapted]).view(2, -1)
    if OBJECTIVES[name].reference:
        with model.disable_adapter():
            base = row_losses(model, answers, batch_tokens=batch_tokens)
        reference = torch.tensor([-row.loss for row in base]).view(2, -1)
    tokens = torch.tensor([row.tokens for row in adapted])
    loss = pair_losses(answer_scores(name, policy, reference, tokens), tokens, config, name=name).mean()
    if config.likelihood:
        loss = loss - config.likelihood * policy[0].sum() / tokens[: len(pairs)].sum()
    given = rewards(name, policy, reference, tokens, config)
    margins, resampled = given[0] - given[1], Bootstrap(len(pairs), samples=RESAMPLES, seed=1)
    return {
        "eval_loss": float(loss),
        **named(figures(policy, given, tokens), prefix="eval"),
        **bounds("eval/reward_margin", resampled.level(mean_of(margins.tolist()))),
        **bounds("eval/reward_accuracy", resampled.level(mean_of((margins > 0).double().tolist()))),
    }


def bounds(name: str, interval: Interval | Difference) -> dict[str, float]:
    """Returns the ends of a figure's 95 % interval as figures of their own."""
    return {f"{name}_low": interval.low, f"{name}_high": interval.high}
