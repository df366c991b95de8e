"""Is this the model that was trained? Whole distributions against a recorded reference, token by token.

The same pass gives each row's loss: a distribution goes to disk, so few are compared; a loss is one number, so all rows have one.
"""

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
class Reference:
    """A model's log-probabilities at the first trained positions, on disk, and its loss on every row.

    Attributes:
        file: float32, shape (positions, vocabulary), rows one after another.
        positions: Trained tokens whose distributions are kept.
        vocabulary: Entries of a distribution.
        losses: The reference's own, of each row; whoever compares with the file does not need them.
    """

    file: Path
    positions: int
    vocabulary: int
    losses: Sequence[RowLoss] = ()

    @property
    def loss(self) -> float:
        """Nats per trained token, over all rows."""
        return mean_loss(self.losses)


@dataclass(frozen=True, slots=True)
class KLResult:
    """How near a model is to the reference, over the same trained tokens.

    Attributes:
        kl: Mean KL(reference || model), in nats per token.
        top1_agreement: Share of positions where both rank the same token first.
        max_difference: Largest difference of a log-probability that the reference holds above one in a million.
        compared_tokens: Positions compared.
        losses: The model's own, of each row, compared or not.
    """

    kl: float
    top1_agreement: float
    max_difference: float
    compared_tokens: int
    losses: Sequence[RowLoss]

    @property
    def loss(self) -> float:
        """Nats per trained token, over all rows."""
        return mean_loss(self.losses)

    @property
    def distances(self) -> dict[str, float]:
        """All but the losses."""
        names = ("kl", "top1_agreement", "max_difference", "compared_tokens")
        return {name: getattr(self, name) for name in names}


SEEN_LOG_PROBABILITY = math.log(1e-6)
"""Below it a log-probability is dominated by rounding and has no effect on text."""


def reference_logprobs(
    model: Any,
    rows: Sequence[Row],
    file: Path,
    *,
    batch_tokens: int,
    tokens: int | None = None,
    progress: str | None = None,
) -> Reference:
    """Takes the model's loss on the rows, and records its log-probabilities at their first trained positions.

    Args:
        model: The model that others are to be compared with.
        rows: ``input_ids`` and ``labels`` each.
        file: Written as raw float32; takes 4 bytes times recorded positions times vocabulary.
        batch_tokens: Padded tokens per forward pass.
        tokens: Positions to record at most; None records all.
        progress: Title of the progress bar; None for none.

    Raises:
        EvalError: A row is longer than the positions that the model has.
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
    return Reference(file=file, positions=positions, vocabulary=vocabulary, losses=totals.rows)


def agreement(
    model: Any, rows: Sequence[Row], reference: Reference, *, batch_tokens: int, progress: str | None = None
) -> KLResult:
    """Takes a model's loss on the rows, and compares it with a reference that was recorded on the same rows.

    A vocabulary that was padded in one of the two is compared over the entries that both have.

    Args:
        model: The model to compare.
        rows: The very rows of the reference, in the same order.
        reference: What `reference_logprobs` returned.
        batch_tokens: Padded tokens per forward pass.
        progress: Title of the progress bar; None for none.
    """
    starts, trained = _starts(rows)
    if trained < reference.positions:
        raise ValueError(f"the reference holds {reference.positions} positions and the rows have {trained}: other rows")
    memory = np.memmap(reference.file, dtype=np.float32, mode="r", shape=(reference.positions, reference.vocabulary))
    divergence, agreed, furthest, totals = 0.0, 0, 0.0, Totals(len(rows))
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
        furthest = max(furthest, float(difference.abs().masked_fill(theirs < SEEN_LOG_PROBABILITY, 0.0).max()))
    count = max(reference.positions, 1)
    return KLResult(
        kl=max(divergence / count, 0.0),
        top1_agreement=agreed / count,
        max_difference=furthest,
        compared_tokens=reference.positions,
        losses=totals.rows,
    )


def _starts(rows: Sequence[Row]) -> tuple[np.ndarray, int]:
    counts = np.array([trained_tokens(row) for row in rows], dtype=np.int64)
    return np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else counts, int(counts.sum())


def _recorded(chunk: Chunk, starts: np.ndarray, positions: int) -> tuple[np.ndarray, torch.Tensor]:
    """Where in the file the chunk's positions stand, and their logits; those beyond the recorded ones are left out."""
    places: np.ndarray = starts[chunk.rows.numpy()] + chunk.ordinals.numpy()
    kept = np.flatnonzero(places < positions)
    return places[kept], chunk.logits if len(kept) == len(places) else chunk.logits[
        torch.from_numpy(kept).to(chunk.logits.device)
    ]
