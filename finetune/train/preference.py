"""Pairs of answers: the rows that are usable, their micro-batches, and the log-probabilities of their answers.

The policy is the adapted model, and the reference of DPO is the same model with its adapter switched off, so both share
one copy of the base; ORPO, SimPO and CPO need no reference. TRL's trainers cannot use prepared rows: they tokenize
their input, support only masks at the end of a row, and copy an adapter that they did not attach themselves. The tests
compare the losses with TRL's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import TrainError
from finetune.inference.rows import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from finetune.kernels import Fusion


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
    return as_document(row["input_ids"], row["labels"])


def rejected(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the rejected answer of a pair as a document with its prompt."""
    return as_document(row["rejected_input_ids"], row["rejected_labels"])


def as_document(ids: list[int], labels: list[int]) -> dict[str, Any]:
    """Returns an answer with its prompt as a document that trains on its last turn alone."""
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
            f"train: none of the {len(rows):,} training rows is a pair ({reasons}); "
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
            f"train: none of the first {len(rows):,} held-out rows is a pair ({obstacle(rows[0])}); "
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
