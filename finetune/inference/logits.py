"""Computes logits at trained positions only: the decoder once per batch, the head in chunks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.console import ProgressBar
from finetune.errors import EvalError
from finetune.inference.budget import CHUNK_BYTES
from finetune.inference.oom import in_halves
from finetune.inference.rows import IGNORED, Row, token_batches

PROBE_TOKENS = 8
PROBE_TOLERANCE = 0.02
"""Decoder and head may differ from the whole model by rounding; a model that scales its logits differs by much more."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Logits of some trained positions.

    Attributes:
        rows: Row of each position, shape (n,), on the CPU.
        ordinals: Which trained token of its row each is, shape (n,), on the CPU.
        targets: The tokens to predict, shape (n,).
        logits: float32, shape (n, vocabulary).
    """

    rows: Tensor
    ordinals: Tensor
    targets: Tensor
    logits: Tensor


def unwrap(model: Any) -> Any:
    """Returns the causal language model inside a peft wrapper; adapters stay active, since they are in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: Any) -> torch.device:
    """Returns the device of the model's inputs; offloaded weights have none of their own."""
    hook = getattr(unwrap(model), "_hf_hook", None)
    device: Any = getattr(hook, "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Sets evaluation mode without gradients, and restores the mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def trained_logits(
    model: Any, rows: Sequence[Row], *, batch_tokens: int, progress: str | None = None
) -> Iterator[Chunk]:
    """Yields the logits that predict each trained token, teacher-forced.

    Args:
        model: A causal language model, with or without a peft adapter; on one device.
        rows: ``input_ids`` and ``labels`` each; tokens with the label -100 are context only.
        batch_tokens: Padded tokens per forward pass.
        progress: Title of the progress bar; None for none.

    Returns:
        Chunks in the order of the batches (longest rows first), not of the rows.

    Raises:
        EvalError: A row has more tokens than the model has positions.
    """
    _check_lengths(model, rows)
    batches = token_batches(rows, batch_tokens=batch_tokens)
    lengths = [len(row["input_ids"]) for row in rows]
    with (
        evaluating(model),
        ProgressBar(
            progress or "",
            total=sum(lengths[index] for batch in batches for index in batch),
            unit="tokens",
            is_shown=progress is not None,
        ) as bar,
    ):
        split = _SplitModel(unwrap(model))
        for batch in in_halves(batches, lambda indices: split.forward([rows[index] for index in indices], indices)):
            yield from split.chunks(batch)
            bar.advance(sum(lengths[index] for index in batch.indices))


def _check_lengths(model: Any, rows: Sequence[Row]) -> None:
    positions = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    if positions is not None and longest > positions:
        raise EvalError(
            f"a held-out row has {longest} tokens and the model has {positions} positions; "
            f"lower data.max_tokens to {positions}"
        )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Row numbers, labels of shape (rows, longest), and their hidden states, or logits, from one forward pass."""

    indices: Sequence[int]
    labels: Tensor
    source: Tensor


class _SplitModel:
    """A model split into decoder and head, or whole where its logits are not just the head's output."""

    def __init__(self, causal: Any) -> None:
        self.causal = causal
        self.device = input_device(causal)
        self.head = causal.get_output_embeddings()
        self.decoder: Any = causal.get_decoder() if hasattr(causal, "get_decoder") else None
        self.softcap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
        vocabulary = self.head.weight.shape[0] if self.head is not None else causal.config.get_text_config().vocab_size
        self.chunk_positions = max(1, CHUNK_BYTES // (4 * vocabulary))
        self.splits = (
            self.head is not None and self.decoder is not None and self.decoder is not causal and self._splits_exactly()
        )

    def _splits_exactly(self) -> bool:
        vocabulary = self.causal.config.get_text_config().vocab_size
        ids = torch.arange(PROBE_TOKENS, device=self.device)[None] % vocabulary
        mask = torch.ones_like(ids)
        whole = self.causal(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        halves = self._logits(self._hidden(ids, mask)[0])[None]
        return bool((whole - halves.to(whole.device)).abs().max() <= PROBE_TOLERANCE * whole.abs().max().clamp(min=1.0))

    def forward(self, rows: Sequence[Row], indices: Sequence[int]) -> _Batch:
        ids, mask, labels = (tensor.to(self.device) for tensor in _pad(rows))
        source = self._hidden(ids, mask) if self.splits else self._whole(ids, mask)
        return _Batch(indices=indices, labels=labels.to(source.device), source=source)

    def chunks(self, batch: _Batch) -> Iterator[Chunk]:
        labels = batch.labels
        trained = labels[:, 1:] != IGNORED
        where = trained.nonzero()
        targets = labels[:, 1:][where[:, 0], where[:, 1]]
        owners = torch.tensor(batch.indices)[where[:, 0].cpu()]
        ordinals = (trained.cumsum(1) - 1)[where[:, 0], where[:, 1]].cpu()
        for start in range(0, len(where), self.chunk_positions):
            part = slice(start, start + self.chunk_positions)
            selected = batch.source[where[part, 0], where[part, 1]]
            logits = (self._logits(selected) if self.splits else selected.float()).to(labels.device)
            yield Chunk(rows=owners[part], ordinals=ordinals[part], targets=targets[part], logits=logits)

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden.to(self.head.weight.dtype)).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _whole(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.causal(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits


def _pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns right-padded ids, mask and labels, each of shape (rows, longest)."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        labels[index, :length] = torch.tensor(row["labels"])
        mask[index, :length] = 1
    return ids, mask, labels
