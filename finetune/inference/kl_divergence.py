"""Compares a model with a recorded reference by the KL divergence of their predictions, token by token.

The same pass measures the loss of every row. Distributions are large, so only those of the first positions are
compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.inference.logits import Chunk, trained_logits
from finetune.inference.losses import RowLoss, Totals, mean_loss
from finetune.inference.rows import Row, trained_tokens


@dataclass(frozen=True, slots=True)
class ReferenceLogits:
    """A model's log-probabilities at the first trained positions, in a file, and its loss on every row.

    Attributes:
        file: float32, shape (positions, vocabulary), row after row.
        positions: Number of recorded distributions.
        vocabulary: Entries of a distribution.
        losses: Of each row; a comparison with the file does not need them.
    """

    file: Path
    positions: int
    vocabulary: int
    losses: Sequence[RowLoss] = ()

    @property
    def loss(self) -> float:
        """Returns nats per trained token, over all rows."""
        return mean_loss(self.losses)


@dataclass(frozen=True, slots=True)
class KLResult:
    """How close a model is to the reference, over the same trained tokens.

    Attributes:
        kl: Mean KL(reference || model), in nats per token.
        top1_agreement: Share of positions where both rank the same token first.
        max_difference: Largest difference of a log-probability whose probability in the reference is above 1e-6.
        compared_tokens: Number of compared positions.
        losses: Of each row, compared or not.
    """

    kl: float
    top1_agreement: float
    max_difference: float
    compared_tokens: int
    losses: Sequence[RowLoss]

    @property
    def loss(self) -> float:
        """Returns nats per trained token, over all rows."""
        return mean_loss(self.losses)

    @property
    def distances(self) -> dict[str, float]:
        """Returns all fields but the losses."""
        names = ("kl", "top1_agreement", "max_difference", "compared_tokens")
        return {name: getattr(self, name) for name in names}


MIN_LOG_PROBABILITY = math.log(1e-6)
"""Lower log-probabilities are dominated by rounding and have no effect on text."""


def record_reference(
    model: Any,
    rows: Sequence[Row],
    file: Path,
    *,
    batch_tokens: int,
    tokens: int | None = None,
    progress: str | None = None,
) -> ReferenceLogits:
    """Measures the model's loss on the rows, and records its log-probabilities at their first trained positions.

    Args:
        model: The model that others will be compared with.
        rows: ``input_ids`` and ``labels`` each.
        file: Written as raw float32: 4 bytes times recorded positions times vocabulary.
        batch_tokens: Padded tokens per forward pass.
        tokens: Maximum number of positions to record; None records all.
        progress: Title of the progress bar; None for none.

    Raises:
        EvalError: A row has more tokens than the model has positions.
    """
    starts, trained = _starts(rows)
    positions = trained if tokens is None else min(tokens, trained)
    memory: Any = None
    vocabulary, totals = 0, Totals(len(rows))
    for chunk in trained_logits(model, rows, batch_tokens=batch_tokens, progress=progress):
        totals.add(chunk)
        if memory is None:
            vocabulary = chunk.logits.shape[-1]
            memory = np.memmap(file, dtype=np.float32, mode="w+", shape=(positions, vocabulary))
        places, logits = _recorded(chunk, starts, positions)
        memory[places] = torch.log_softmax(logits, dim=-1).cpu().numpy()
    if memory is not None:
        memory.flush()
    return ReferenceLogits(file=file, positions=positions, vocabulary=vocabulary, losses=totals.rows)


def compare_with_reference(
    model: Any, rows: Sequence[Row], reference: ReferenceLogits, *, batch_tokens: int, progress: str | None = None
) -> KLResult:
    """Measures a model's loss on the rows, and compares it with a reference that was recorded on the same rows.

    If one vocabulary is padded, the entries that both have are compared.

    Args:
        model: The model to compare.
        rows: Those of the reference, in the same order.
        reference: From `record_reference`.
        batch_tokens: Padded tokens per forward pass.
        progress: Title of the progress bar; None for none.

    Raises:
        ValueError: The rows have fewer trained tokens than the reference, so they are not the same rows.
    """
    starts, trained = _starts(rows)
    if trained < reference.positions:
        raise ValueError(f"the reference has {reference.positions} positions and these rows {trained}: other rows")
    memory = np.memmap(reference.file, dtype=np.float32, mode="r", shape=(reference.positions, reference.vocabulary))
    divergence, agreed, largest, totals = 0.0, 0, 0.0, Totals(len(rows))
    for chunk in trained_logits(model, rows, batch_tokens=batch_tokens, progress=progress):
        totals.add(chunk)
        places, logits = _recorded(chunk, starts, reference.positions)
        if not len(places):
            continue
        shared = min(reference.vocabulary, logits.shape[-1])
        ours = torch.log_softmax(logits, dim=-1)[:, :shared]
        theirs = torch.from_numpy(np.ascontiguousarray(memory[places])).to(ours.device)[:, :shared]
        difference = theirs - ours
        divergence += float((theirs.exp() * difference).sum(-1).double().sum())
        agreed += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        difference = difference.abs().masked_fill(theirs < MIN_LOG_PROBABILITY, 0.0)
        largest = max(largest, float(difference.max()))
    count = max(reference.positions, 1)
    return KLResult(
        kl=max(divergence / count, 0.0),
        top1_agreement=agreed / count,
        max_difference=largest,
        compared_tokens=reference.positions,
        losses=totals.rows,
    )


def _starts(rows: Sequence[Row]) -> tuple[np.ndarray, int]:
    counts = np.array([trained_tokens(row) for row in rows], dtype=np.int64)
    return np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else counts, int(counts.sum())


def _recorded(chunk: Chunk, starts: np.ndarray, positions: int) -> tuple[np.ndarray, torch.Tensor]:
    """Returns the file's rows of the chunk's recorded positions, and their logits."""
    places: np.ndarray = starts[chunk.rows.numpy()] + chunk.ordinals.numpy()
    recorded = np.flatnonzero(places < positions)
    if len(recorded) == len(places):
        return places, chunk.logits
    return places[recorded], chunk.logits[torch.from_numpy(recorded).to(chunk.logits.device)]
