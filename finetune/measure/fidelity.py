"""Is this the model that was trained? Whole distributions against a recorded reference, token by token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.measure.logits import Chunk, trained_logits
from finetune.measure.rows import Row, trained_tokens


@dataclass(frozen=True, slots=True)
class Reference:
    """Log-probabilities of a model at every trained position, on disk.

    Attributes:
        file: float32, shape (positions, vocabulary), rows one after another.
        positions: Trained tokens over all rows.
        vocabulary: Entries of a distribution.
        loss: The reference's own mean loss, in nats per trained token.
    """

    file: Path
    positions: int
    vocabulary: int
    loss: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near a model is to the reference, over the same trained tokens.

    Attributes:
        kl: Mean KL(reference || model), in nats per token.
        top1_agreement: Share of positions where both rank the same token first.
        max_difference: Largest difference of a log-probability that the reference holds above one in a million.
        tokens: Positions compared.
        loss: The model's own mean loss on them, in nats per token.
        perplexity: exp(loss).
    """

    kl: float
    top1_agreement: float
    max_difference: float
    tokens: int
    loss: float
    perplexity: float


SEEN_LOG_PROBABILITY = math.log(1e-6)
"""Below it a log-probability is dominated by rounding and has no effect on text."""


def reference_logprobs(model: Any, rows: Sequence[Row], file: Path, *, batch_tokens: int, progress: str | None = None) -> Reference:
    """Records the model's log-probabilities at each trained position of the rows.

    Args:
        model: The model that others are to be compared with.
        rows: ``input_ids`` and ``labels`` each. The file takes 4 bytes times trained tokens times vocabulary.
        file: Written as raw float32.
        batch_tokens: Padded tokens per forward pass.
        progress: Title of the progress bar; None for none.

    Raises:
        EvalError: A row is longer than the positions that the model has.
    """
    starts, positions = _starts(rows)
    memory: Any = None
    vocabulary, loss = 0, 0.0
    for chunk in trained_logits(model, rows, batch_tokens=batch_tokens, progress=progress):
        if memory is None:
            vocabulary = chunk.logits.shape[-1]
            memory = np.memmap(file, dtype=np.float32, mode="w+", shape=(positions, vocabulary))
        logprobs = torch.log_softmax(chunk.logits, dim=-1)
        loss -= float(logprobs.gather(1, chunk.targets[:, None]).double().sum())
        memory[_places(chunk, starts)] = logprobs.cpu().numpy()
    if memory is not None:
        memory.flush()
    return Reference(file=file, positions=positions, vocabulary=vocabulary, loss=loss / positions if positions else float("nan"))


def agreement(model: Any, rows: Sequence[Row], reference: Reference, *, batch_tokens: int, progress: str | None = None) -> Agreement:
    """Compares a model with a reference that was recorded on the same rows.

    A vocabulary that was padded in one of the two is compared over the entries that both have.

    Args:
        model: The model to compare.
        rows: The very rows of the reference, in the same order.
        reference: What `reference_logprobs` returned.
        batch_tokens: Padded tokens per forward pass.
        progress: Title of the progress bar; None for none.
    """
    starts, positions = _starts(rows)
    if positions != reference.positions:
        raise ValueError(f"the reference holds {reference.positions} positions and the rows have {positions}: other rows")
    memory = np.memmap(reference.file, dtype=np.float32, mode="r", shape=(reference.positions, reference.vocabulary))
    divergence, agreed, furthest, loss = 0.0, 0, 0.0, 0.0
    for chunk in trained_logits(model, rows, batch_tokens=batch_tokens, progress=progress):
        shared = min(reference.vocabulary, chunk.logits.shape[-1])
        ours = torch.log_softmax(chunk.logits, dim=-1)
        theirs = torch.from_numpy(np.ascontiguousarray(memory[_places(chunk, starts)])).to(ours.device)
        loss -= float(ours.gather(1, chunk.targets[:, None]).double().sum())
        ours, theirs = ours[:, :shared], theirs[:, :shared]
        difference = theirs - ours
        divergence += float((theirs.exp() * difference).sum(-1).double().sum())
        agreed += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        furthest = max(furthest, float(difference.abs().masked_fill(theirs < SEEN_LOG_PROBABILITY, 0.0).max()))
    count = max(positions, 1)
    return Agreement(
        kl=max(divergence / count, 0.0),
        top1_agreement=agreed / count,
        max_difference=furthest,
        tokens=positions,
        loss=loss / count,
        perplexity=math.exp(min(loss / count, 700.0)),
    )


def _starts(rows: Sequence[Row]) -> tuple[np.ndarray, int]:
    counts = np.array([trained_tokens(row) for row in rows], dtype=np.int64)
    return np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else counts, int(counts.sum())


def _places(chunk: Chunk, starts: np.ndarray) -> np.ndarray:
    places: np.ndarray = starts[chunk.rows.numpy()] + chunk.ordinals.numpy()
    return places
