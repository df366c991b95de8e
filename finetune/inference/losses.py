"""Measures the loss of each held-out row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.inference.logits import Chunk, trained_logits
from finetune.inference.rows import Row


@dataclass(frozen=True, slots=True)
class RowLoss:
    """The loss of one row.

    Attributes:
        loss: Negative log-likelihood in nats, summed over the trained tokens.
        tokens: Trained tokens.
        correct: Trained tokens that the model predicts as the most likely ones.
    """

    loss: float
    tokens: int
    correct: int


class Totals:
    """Sums the losses of rows while their logits are streamed.

    Args:
        rows: Number of rows.
    """

    def __init__(self, rows: int) -> None:
        self._losses = np.zeros(rows)
        self._tokens = np.zeros(rows, dtype=np.int64)
        self._correct = np.zeros(rows, dtype=np.int64)

    def add(self, chunk: Chunk) -> None:
        losses = torch.nn.functional.cross_entropy(chunk.logits, chunk.targets, reduction="none").double().cpu().numpy()
        hits = (chunk.logits.argmax(-1) == chunk.targets).cpu().numpy()
        owners = chunk.rows.numpy()
        np.add.at(self._losses, owners, losses)
        np.add.at(self._tokens, owners, 1)
        np.add.at(self._correct, owners, hits)

    @property
    def rows(self) -> list[RowLoss]:
        sums = zip(self._losses, self._tokens, self._correct, strict=True)
        return [RowLoss(loss=float(loss), tokens=int(tokens), correct=int(correct)) for loss, tokens, correct in sums]


def row_losses(model: Any, rows: Sequence[Row], *, batch_tokens: int, progress: str | None = None) -> list[RowLoss]:
    """Returns the teacher-forced loss of each row over its trained tokens, whose label is not -100.

    Args:
        model: A causal language model, with or without a peft adapter.
        rows: ``input_ids`` and ``labels`` each.
        batch_tokens: Padded tokens per forward pass. Memory also holds 64 MiB of logits, whatever the vocabulary.
        progress: Title of the progress bar; None for none.

    Returns:
        One loss per row, in the order of ``rows``; zeros where a row has no trained token.

    Raises:
        EvalError: A row has more tokens than the model has positions.
    """
    totals = Totals(len(rows))
    for chunk in trained_logits(model, rows, batch_tokens=batch_tokens, progress=progress):
        totals.add(chunk)
    return totals.rows


def mean_loss(losses: Sequence[RowLoss]) -> float:
    """Returns nats per trained token over all rows; every token has the same weight. NaN without trained tokens."""
    tokens = sum(row.tokens for row in losses)
    return sum(row.loss for row in losses) / tokens if tokens else float("nan")
