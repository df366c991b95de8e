"""Learning from pairs: DPO's loss, its numbers, and the rows that it can use.

The policy is the adapted model and the reference the same model with its adapter switched off, so one copy of the base
serves both. TRL's DPOTrainer cannot be fed rows that are prepared already: it tokenises whatever it is given, takes masks
that end a row only, and keeps a second copy of an adapter that it did not attach itself. Its loss is the tests' oracle.
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
    """How strongly one answer is preferred to another."""

    beta: float = 0.1
    """How dear it is to leave the reference: small lets the model go far. ``ipo``: 1 / (2 beta) is the margin it aims at.
    Source of the 0.1: arXiv 2305.18290, appendix B."""

    loss: str = "sigmoid"
    """``sigmoid`` (DPO), ``hinge`` (SLiC: no gradient once the margin is 1) or ``ipo`` (squared distance from a margin by token;
    holds back where every pair can be told apart)."""

    label_smoothing: float = 0.0
    """``sigmoid`` only: share of the pairs whose labels are taken to be the wrong way round, 0 to below 0.5."""

    def problems(self) -> Iterator[str]:
        if self.beta <= 0:
            yield f"train.preference.beta must be positive, or no answer is preferred; got {self.beta}"
        if self.loss not in LOSSES:
            yield f"train.preference.loss must be one of {', '.join(LOSSES)}; got {self.loss!r}"
        if not 0 <= self.label_smoothing < 0.5:
            yield f"train.preference.label_smoothing must be at least 0 and below 0.5; got {self.label_smoothing}"
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
            yield (
                f"train.preference.label_smoothing belongs to loss=sigmoid and would do nothing with loss={self.loss}; "
                f"got {self.label_smoothing}: set it to 0"
            )


def conflicts(*, variant: str, dropout: float, neftune_alpha: float | None) -> Iterator[str]:
    """Problems of a preference objective with ``lora.variant``, ``lora.dropout`` and ``train.neftune_alpha``."""
    if variant == "loftq":
        yield (
            "lora.variant=loftq starts beside the base, and a preference objective takes the base as its reference: "
            "the first step would already be away from it; choose lora=default"
        )
    if dropout:
        yield (
            "lora.dropout makes the log-probabilities noisy that a preference objective compares with those of the reference; "
            f"got {dropout}: set lora.dropout=0"
        )
    if neftune_alpha is not None:
        yield (
            "train.neftune_alpha would put other noise on the policy than on the reference that a preference objective compares it "
            f"with; got {neftune_alpha}: set it to null"
        )


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Micro-batches of pairs: all chosen answers, then all rejected ones, each a document with its prompt.

    Attributes:
        flat: All documents end to end in one row, as `finetune.inference.Collator` has it.
        pad_token_id: Fills the rows up where they are not flat.
    """

    flat: bool
    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows: From `training_pairs`.

        Returns:
            What `Collator` returns, and ``answer_tokens``: trained tokens of each answer, shape (2 pairs,).
        """
        import torch

        from finetune.inference.collate import Collator

        answers = [*(chosen(row) for row in rows), *(rejected(row) for row in rows)]
        batch = Collator(flat=self.flat, pad_token_id=self.pad_token_id)(answers)
        progress = [sum(label != IGNORED for label in answer["labels"]) for answer in answers]
        return {**batch, "answer_tokens": torch.tensor(progress)}


def chosen(row: dict[str, Any]) -> dict[str, Any]:
    """The better answer of a pair as a document of its own."""
    return _document(row["input_ids"], row["labels"])


def rejected(row: dict[str, Any]) -> dict[str, Any]:
    """The worse one."""
    return _document(row["rejected_input_ids"], row["rejected_labels"])


def _document(ids: list[int], labels: list[int]) -> dict[str, Any]:
    start = answer_start(labels)
    return {"input_ids": ids, "labels": [IGNORED] * start + labels[start:], "seq_lengths": [len(ids)]}


def answer_start(labels: Sequence[int]) -> int:
    """First token of the last trained stretch, which is the answer: earlier turns are the prompt of both, trained or not.

    Returns:
        ``len(labels)`` where no token but the first is trained: nothing stands before that one.
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
    """The rows of data/train that a preference can be learnt from; how many cannot is said.

    Args:
        rows: ``input_ids``, ``labels``, ``rejected_input_ids`` and ``rejected_labels``, one document each.

    Returns:
        Those rows, and the tokens of a pair on average: both answers, each with the prompt.

    Raises:
        TrainError: None is a pair.
    """
    sizes: dict[int, int] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows):
        reason = obstacle(row)
        if reason is None:
            sizes[number] = len(row["input_ids"]) + len(row["rejected_input_ids"])
        else:
            left_out[reason] += 1
    why = "; ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
    if not sizes:
        raise TrainError(
            f"train.objective=dpo: none of the {len(rows):,} training rows is a pair ({why}); "
            'give rows like {"prompt", "chosen", "rejected"}, e.g. data=preference data.path=<file>'
        )
    if left_out:
        log(
            "train",
            f"{left_out.total():,} of {len(rows):,} training rows are left out, because they are no pairs: {why}",
        )
    return rows.select(list(sizes)), sum(sizes.values()) / len(sizes)


def held_out_pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those held-out rows that are pairs.

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
        log("train", f"held-out loss on {len(pairs):,} of {len(rows):,} rows, because the others are no pairs")
    return pairs


def obstacle(row: dict[str, Any]) -> str | None:
    """Why a row is no pair of answers to one prompt; None where it is."""
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
    """Log-probability of each answer.

    Args:
        losses: Of all trained tokens in the order of the answers, shape (tokens,), in nats.
        answer_tokens: Trained tokens of each answer, shape (2 pairs,).

    Returns:
        Shape (2, pairs): chosen, rejected; float32.
    """
    import torch

    sums = [-part.sum() for part in losses.float().split(answer_tokens.tolist())]
    return torch.stack(sums).view(2, -1)


def token_losses(model: Any, causal: Any, inputs: dict[str, Any], quick: Fusion) -> Tensor:
    """Loss of every trained token in nats, shape (tokens,).

    Args:
        model: As the trainer wrapped it; its base has TRL's head, which SFTTrainer puts on it.
        causal: The same model bare.
        inputs: A micro-batch of `PairCollator` without ``answer_tokens``.
        quick: How steps are computed.
    """
    if quick.loss_on_trained_tokens:
        return quick.token_losses(causal, inputs)
    found = model(**inputs, fused_lm_head=True).log_probs
    losses: Tensor = -found[inputs["labels"][:, 1:] != IGNORED]
    return losses


def pair_losses(ratios: Tensor, answer_tokens: Tensor, config: PreferenceConfig) -> Tensor:
    """The loss of each pair, shape (pairs,).

    Args:
        ratios: Log-probability under the policy less that under the reference, shape (2, pairs): chosen, rejected.
        answer_tokens: Trained tokens of each answer, shape (2 pairs,); ``ipo`` divides by them, as its authors do.
        config: Form and numbers.

    Source: arXiv 2305.18290 (sigmoid, smoothed as in its authors' note on noisy labels), 2310.12036 (ipo), 2305.10425 (hinge).
    """
    from torch.nn.functional import logsigmoid

    if config.loss == "ipo":
        by_token = ratios / answer_tokens.view(2, -1)
        return (by_token[0] - by_token[1] - 1 / (2 * config.beta)) ** 2
    logits = config.beta * (ratios[0] - ratios[1])
    if config.loss == "hinge":
        return (1 - logits).relu()
    smoothing = config.label_smoothing
    return -logsigmoid(logits) * (1 - smoothing) - logsigmoid(-logits) * smoothing


def figures(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """What is watched, summed over pairs, shape (pairs counted and `FIGURES`,).

    Args:
        policy: Log-probabilities, shape (2, pairs).
        reference: The same of the reference.
    """
    import torch

    rewards = beta * (policy - reference).detach()
    margins = rewards[0] - rewards[1]
    sums = [torch.ones_like(margins).sum(), margins.sum(), (margins > 0).float().sum(), *policy.detach().sum(1)]
    return torch.stack(sums).double().cpu()


def named(sums: Tensor, *, prefix: str) -> dict[str, float]:
    """The means by name, e.g. ``train/reward_margin``."""
    pairs, *rest = sums.tolist()
    return {f"{prefix}/{name}": value / pairs for name, value in zip(FIGURES, rest, strict=True)}


def held_out_figures(
    model: Any, pairs: Sequence[dict[str, Any]], config: PreferenceConfig, *, batch_tokens: int
) -> dict[str, float]:
    """Mean loss of held-out pairs as ``eval_loss``, and what is watched.

    Args:
        model: The peft model.
        pairs: From `held_out_pairs`, at least one.
        batch_tokens: Padded tokens per forward pass.
    """
    import torch

    from finetune.inference.losses import row_losses

    answers = [*map(chosen, pairs), *map(rejected, pairs)]
    found = row_losses(model, answers, batch_tokens=batch_tokens)
    with model.disable_adapter():
        base = row_losses(model, answers, batch_tokens=batch_tokens)
    policy, reference = (torch.tensor([-row.loss for row in rows]).view(2, -1) for rows in (found, base))
    losses = pair_losses(policy - reference, torch.tensor([row.tokens for row in found]), config)
    return {"eval_loss": float(losses.mean()), **named(figures(policy, reference, beta=config.beta), prefix="eval")}
