"""Direct preference optimization: its loss, its figures, and the rows that it can use.

The policy is the adapted model, and the reference is the same model with its adapter switched off, so both share one
copy of the base. TRL's DPOTrainer cannot use prepared rows: it tokenizes its input, supports only masks at the end of a
row, and copies an adapter that it did not attach itself. The tests compare the loss with TRL's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import TrainError
from finetune.inference.rows import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from finetune.kernels import Fusion

LOSSES = ("sigmoid", "ipo", "hinge")
FIGURES = ("reward_margin", "reward_accuracy", "chosen_logprob", "rejected_logprob")


@dataclass(kw_only=True, slots=True)
class PreferenceConfig:
    """Form and strength of the preference loss."""

    beta: float = 0.1
    """Cost of leaving the reference; with a small one the model moves far from it. With ``ipo``, 1 / (2 beta) is the
    target margin. Source of the 0.1: arXiv 2305.18290, appendix B."""

    loss: str = "sigmoid"
    """``sigmoid`` (DPO), ``hinge`` (SLiC: no gradient once the margin is 1) or ``ipo`` (squared distance from a margin
    per token; overfits less where every pair is easy to separate)."""

    label_smoothing: float = 0.0
    """``sigmoid`` only: assumed share of pairs whose answers are swapped, at least 0 and below 0.5."""

    def problems(self) -> Iterator[str]:
        if self.beta <= 0:
            yield f"train.preference.beta must be positive, otherwise no answer is preferred; got {self.beta}"
        if self.loss not in LOSSES:
            yield f"train.preference.loss must be one of {', '.join(LOSSES)}; got {self.loss!r}"
        if not 0 <= self.label_smoothing < 0.5:
            yield f"train.preference.label_smoothing must be at least 0 and below 0.5; got {self.label_smoothing}"
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
            yield (
                f"train.preference.label_smoothing has an effect with loss=sigmoid only, not with loss={self.loss}; "
                f"got {self.label_smoothing}: set it to 0"
            )


def conflicts(*, variant: str, dropout: float, neftune_alpha: float | None) -> Iterator[str]:
    """Yields problems of a preference objective with the lora group and with noise on the embeddings."""
    if variant == "loftq":
        yield (
            "lora.variant=loftq starts with an adapter that changes the base, and the base is the reference of a "
            "preference objective: the first step would already differ from it; choose lora=default"
        )
    if dropout:
        yield (
            "lora.dropout adds noise to the log-probabilities that a preference objective compares with those of the "
            f"reference; got {dropout}: set lora.dropout=0"
        )
    if neftune_alpha is not None:
        yield (
            "train.neftune_alpha would put other noise on the policy than on the reference that a preference objective "
            f"compares it with; got {neftune_alpha}: set it to null"
        )


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Makes micro-batches of pairs: all chosen answers, then all rejected ones, each a document with its prompt.

    Attributes:
        flat: Concatenates all documents in one row, as `finetune.inference.collate.Collator` does.
        pad_token_id: Pads the rows.
    """

    flat: bool
    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collates pairs.

        Args:
            rows: From `training_pairs`.

        Returns:
            The keys of `Collator`, and ``answer_tokens``: trained tokens of each answer, shape (2 pairs,).
        """
        import torch

        from finetune.inference.collate import Collator

        answers = [*(chosen(row) for row in rows), *(rejected(row) for row in rows)]
        batch = Collator(flat=self.flat, pad_token_id=self.pad_token_id)(answers)
        tokens = [sum(label != IGNORED for label in answer["labels"]) for answer in answers]
        return {**batch, "answer_tokens": torch.tensor(tokens)}


def chosen(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the chosen answer of a pair as a document with its prompt."""
    return _document(row["input_ids"], row["labels"])


def rejected(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the rejected answer of a pair as a document with its prompt."""
    return _document(row["rejected_input_ids"], row["rejected_labels"])


def _document(ids: list[int], labels: list[int]) -> dict[str, Any]:
    start = answer_start(labels)
    return {"input_ids": ids, "labels": [IGNORED] * start + labels[start:], "seq_lengths": [len(ids)]}


def answer_start(labels: Sequence[int]) -> int:
    """Returns the position of the answer, which is the last trained span; earlier turns are the prompt of both answers.

    Returns:
        ``len(labels)`` where no token after the first one is trained: the first one has no token before it.
    """
    end = len(labels)
    while end > 0 and labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    start = max(start, 1)
    return start if start < end else len(labels)


def training_pairs(rows: Dataset) -> tuple[Dataset, float]:
    """Returns the rows of data/train that are pairs, and logs how many are not.

    Args:
        rows: ``input_ids``, ``labels``, ``rejected_input_ids`` and ``rejected_labels``, one document each.

    Returns:
        Those rows, and the mean number of tokens of a pair: both answers, each with the prompt.

    Raises:
        TrainError: None of the rows is a pair.
    """
    sizes: dict[int, int] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows):
        reason = obstacle(row)
        if reason is None:
            sizes[number] = len(row["input_ids"]) + len(row["rejected_input_ids"])
        else:
            left_out[reason] += 1
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
    if not sizes:
        raise TrainError(
            f"train.objective=dpo: none of the {len(rows):,} training rows is a pair ({reasons}); "
            'give rows like {"prompt", "chosen", "rejected"}, e.g. data=preference data.path=<file>'
        )
    if left_out:
        log(
            "train",
            f"leaves out {left_out.total():,} of {len(rows):,} training rows that are not usable pairs: {reasons}",
        )
    return rows.select(list(sizes)), sum(sizes.values()) / len(sizes)


def held_out_pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the held-out rows that are pairs.

    Raises:
        TrainError: There are rows, and none is a pair.
    """
    pairs = [row for row in rows if obstacle(row) is None]
    if rows and not pairs:
        raise TrainError(
            f"train.objective=dpo: none of the first {len(rows):,} held-out rows is a pair ({obstacle(rows[0])}); "
            "give held-out rows with a chosen and a rejected answer, or set train.evaluations=0"
        )
    if len(pairs) < len(rows):
        log("train", f"held-out loss on {len(pairs):,} of {len(rows):,} rows; the others are not usable pairs")
    return pairs


def obstacle(row: dict[str, Any]) -> str | None:
    """Returns why a row is not a pair of answers to one prompt; None where it is one."""
    if not row["rejected_input_ids"]:
        return "no rejected answer"
    first, second = answer_start(row["labels"]), answer_start(row["rejected_labels"])
    if first == len(row["labels"]) or second == len(row["rejected_labels"]):
        return "an answer without a trained token"
    if row["input_ids"][:first] != row["rejected_input_ids"][:second]:
        return "prompts that were cut differently"
    if row["input_ids"] == row["rejected_input_ids"]:
        return "answers that are the same up to data.max_tokens"
    return None


def answer_logprobs(losses: Tensor, answer_tokens: Tensor) -> Tensor:
    """Sums the log-probability of each answer.

    Args:
        losses: Of all trained tokens in the order of the answers, shape (tokens,), in nats.
        answer_tokens: Trained tokens of each answer, shape (2 pairs,).

    Returns:
        Shape (2, pairs): chosen, rejected; float32.
    """
    import torch

    sums = [-part.sum() for part in losses.float().split(answer_tokens.tolist())]
    return torch.stack(sums).view(2, -1)


def token_losses(model: Any, adapted: Any, inputs: dict[str, Any], fusion: Fusion) -> Tensor:
    """Computes the loss of each trained token in nats, shape (tokens,).

    Args:
        model: As the trainer wrapped it; SFTTrainer gives its base TRL's head.
        adapted: The same model without wrappers.
        inputs: A micro-batch of `PairCollator` without ``answer_tokens``.
        fusion: How a training step is computed.
    """
    if fusion.loss_on_trained_tokens:
        return fusion.token_losses(adapted, inputs)
    logprobs = model(**inputs, fused_lm_head=True).log_probs
    losses: Tensor = -logprobs[inputs["labels"][:, 1:] != IGNORED]
    return losses


def pair_losses(ratios: Tensor, answer_tokens: Tensor, config: PreferenceConfig) -> Tensor:
    """Computes the loss of each pair, shape (pairs,).

    Args:
        ratios: Log-probability under the policy minus that under the reference, shape (2, pairs): chosen, rejected.
        answer_tokens: Trained tokens of each answer, shape (2 pairs,); ``ipo`` divides by them, as its authors do.
        config: Form and strength.

    Source: arXiv 2305.18290 (sigmoid, smoothed as in its authors' note on noisy labels), 2310.12036 (ipo), 2305.10425
    (hinge).
    """
    from torch.nn.functional import logsigmoid

    if config.loss == "ipo":
        per_token = ratios / answer_tokens.view(2, -1)
        return (per_token[0] - per_token[1] - 1 / (2 * config.beta)) ** 2
    logits = config.beta * (ratios[0] - ratios[1])
    if config.loss == "hinge":
        return (1 - logits).relu()
    smoothing = config.label_smoothing
    return -logsigmoid(logits) * (1 - smoothing) - logsigmoid(-logits) * smoothing


def figures(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Sums the logged figures over pairs; returns the number of pairs and then `FIGURES`, shape (5,).

    Args:
        policy: Log-probabilities under the policy, shape (2, pairs).
        reference: Likewise under the reference.
    """
    import torch

    rewards = beta * (policy - reference).detach()
    margins = rewards[0] - rewards[1]
    sums = [torch.ones_like(margins).sum(), margins.sum(), (margins > 0).float().sum(), *policy.detach().sum(1)]
    return torch.stack(sums).double().cpu()


def named(sums: Tensor, *, prefix: str) -> dict[str, float]:
    """Returns the means over pairs by name, e.g. ``train/reward_margin``."""
    pairs, *rest = sums.tolist()
    return {f"{prefix}/{name}": value / pairs for name, value in zip(FIGURES, rest, strict=True)}


def held_out_figures(
    model: Any, pairs: Sequence[dict[str, Any]], config: PreferenceConfig, *, batch_tokens: int
) -> dict[str, float]:
    """Computes the mean loss of held-out pairs, as ``eval_loss``, and the logged figures.

    Args:
        model: The peft model.
        pairs: From `held_out_pairs`, at least one.
        batch_tokens: Padded tokens per forward pass.
    """
    import torch

    from finetune.inference.losses import row_losses

    answers = [*map(chosen, pairs), *map(rejected, pairs)]
    adapted = row_losses(model, answers, batch_tokens=batch_tokens)
    with model.disable_adapter():
        base = row_losses(model, answers, batch_tokens=batch_tokens)
    policy, reference = (torch.tensor([-row.loss for row in rows]).view(2, -1) for rows in (adapted, base))
    losses = pair_losses(policy - reference, torch.tensor([row.tokens for row in adapted]), config)
    return {"eval_loss": float(losses.mean()), **named(figures(policy, reference, beta=config.beta), prefix="eval")}
