"""Advantages and losses of answers that the policy sampled itself: GRPO, DAPO, Dr. GRPO, GSPO and RLOO.

Each step samples anew, so the policy that samples is the policy that is trained: the ratio of the two is 1 and only its
gradient counts. Clipping, which the papers use for later passes over the same answers, would change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_DEVIATION = 1e-4
"""Added to a group's deviation, as TRL does: a group whose rewards are equal has advantages of 0."""


def advantages(rewards: Tensor, *, loss: str) -> Tensor:
    """Compares each answer with its group.

    Args:
        rewards: Shape (groups, answers of a group).
        loss: ``train.grpo.loss``.

    Returns:
        The same shape.

    Source: arXiv 2402.03300 (grpo: over the deviation), 2503.20783 (dr_grpo: the difference), 2402.14740 (rloo: less
    the mean of the other answers).
    """
    group = rewards.shape[1]
    centred = rewards - rewards.mean(1, keepdim=True)
    if loss == "rloo":
        return centred * group / (group - 1)
    return centred if loss == "dr_grpo" else centred / (rewards.std(1, keepdim=True) + SMALLEST_DEVIATION)


def policy_losses(
    logprobs: Tensor,
    advantage: Tensor,
    tokens: Tensor,
    *,
    loss: str,
    reference: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """Computes the sum of the loss over answers or tokens, which `normalizer` divides.

    Args:
        logprobs: Of all sampled tokens, answer after answer, shape (tokens,).
        advantage: Of each answer, shape (answers,).
        tokens: Length of each answer, shape (answers,).
        loss: ``train.grpo.loss``.
        reference: Log-probabilities under the reference, shape (tokens,); only read where beta is not 0.
        beta: Weight of the KL divergence, estimated as in arXiv 2402.03300, equation 4.

    Source: as `advantages`, and arXiv 2503.14476 (dapo), 2507.18071 (gspo).
    """
    import torch

    sizes = tokens.tolist()
    difference = logprobs - logprobs.detach()
    if loss == "rloo":
        sums = torch.stack([part.sum() for part in difference.split(sizes)])
        return -(sums.exp() * advantage).sum()
    if loss == "gspo":
        difference = torch.cat([part.mean().expand(len(part)) for part in difference.split(sizes)])
    each = -difference.exp() * torch.repeat_interleave(advantage, tokens)
    if beta and reference is not None:
        each = each + beta * k3(logprobs, reference)
    if loss in ("dapo", "dr_grpo"):
        return each.sum()
    return torch.stack([part.mean() for part in each.split(sizes)]).sum()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimates the KL divergence to the reference at each token, at least 0. Source: arXiv 2402.03300, equation 4."""
    ratio = reference - logprobs
    return ratio.exp() - ratio - 1


def normalizer(*, answers: int, tokens: int, limit: int, loss: str) -> int:
    """Returns what the sum of a step's losses is divided by.

    Args:
        answers: Of the step, over all processes.
        tokens: Of these answers.
        limit: ``train.grpo.max_new_tokens``.
        loss: ``train.grpo.loss``.
    """
    return tokens if loss == "dapo" else answers * limit if loss == "dr_grpo" else answers
