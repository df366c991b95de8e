"""Decodes several rows of one model together: left-padded, with one key-value cache that rows join and leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

from finetune.errors import ModelError
from finetune.serve.engine import Event, Generation, Sampling
from finetune.serve.json_object import JsonAnswer
from finetune.serve.text import TextDecoder

PROBE = ([5, 6, 7, 8, 9, 10, 11], [7, 6, 5])
"""Two short prompts, to find out whether a model computes the same for a padded row."""

PROBE_TOLERANCE = 0.02
"""Padding changes the order of sums, so logits differ by rounding; a model that reads its padding differs by more."""


class Row:
    """One answer in the batch.

    Args:
        generation: What was asked for.
        tokenizer: Decodes its tokens.
        json_answer: Keeps it a JSON object; None for any text.

    Attributes:
        error: Why it cannot be continued; empty while it can.
    """

    def __init__(self, generation: Generation, tokenizer: Any, *, json_answer: JsonAnswer | None = None) -> None:
        self.generation = generation
        self.json_answer = json_answer
        self.decoder = TextDecoder(tokenizer)
        self.generator = torch.Generator().manual_seed(generation.sampling.seed)
        self.last = 0
        self.error = ""
        self.count = 0


class Batch:
    """Rows with their cache. Every row's last token is generated and not yet in the cache.

    Attributes:
        rows: In the order of the tensors.
    """

    def __init__(self, model: Any, rows: Sequence[Row], *, cache: Any, mask: Tensor) -> None:
        self.model, self.rows = model, list(rows)
        self._cache, self._mask = cache, mask

    @classmethod
    def prefill(cls, model: Any, rows: Sequence[Row]) -> tuple[Batch, Tensor]:
        """Reads the prompts of new rows in one forward pass.

        Returns:
            The batch, and the float32 logits after each prompt, shape (rows, vocabulary), on the CPU.
        """
        from transformers import DynamicCache

        prompts = [row.generation.prompt for row in rows]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        # Without the config every layer keeps all positions, also those with a sliding window: the mask hides what is
        # outside, and rows of different lengths stay aligned.
        batch = cls(model, rows, cache=DynamicCache(), mask=mask.to(model.device))
        positions = (batch._mask.cumsum(-1) - 1).clamp(min=0)
        return batch, batch._forward(ids, positions)

    def step(self) -> Tensor:
        """Reads every row's last token; returns float32 logits, shape (rows, vocabulary), on the CPU."""
        ids = torch.tensor([[row.last] for row in self.rows], device=self._mask.device)
        self._mask = pad_tensor(self._mask, (0, 1), value=1)
        return self._forward(ids, self._mask.sum(-1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].float().cpu()

    def join(self, other: Batch) -> None:
        """Adds the rows of another batch of the same model; the shorter one is padded on the left."""
        length = max(self._mask.shape[1], other._mask.shape[1])
        mine, theirs = length - self._mask.shape[1], length - other._mask.shape[1]
        self._mask = torch.cat([pad_tensor(self._mask, (mine, 0)), pad_tensor(other._mask, (theirs, 0))])
        for layer, added in zip(self._cache.layers, other._cache.layers, strict=True):
            for name in ("keys", "values"):
                both = [(getattr(layer, name), mine), (getattr(added, name), theirs)]
                setattr(layer, name, torch.cat([pad_tensor(tensor, (0, 0, padding, 0)) for tensor, padding in both]))
        self.rows += other.rows

    def keep(self, rows: Sequence[Row]) -> None:
        """Drops all other rows, and the padding that no row needs any more."""
        indices = torch.tensor([self.rows.index(row) for row in rows], device=self._mask.device)
        mask = self._mask[indices]
        first = int(mask.any(0).int().argmax())
        self._mask, self.rows = mask[:, first:], list(rows)
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[indices, :, first:], layer.values[indices, :, first:]

    def cache_bytes(self) -> int:
        """Returns the bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)


def check_padding(model: Any, tokenizer: Any, *, rows: int) -> int:
    """Checks that rows of different lengths give the same logits together as alone.

    Args:
        model: A causal language model.
        tokenizer: Of the rows.
        rows: Rows that will be decoded together; nothing is checked for a single one.

    Returns:
        Bytes of the key-value cache per token.

    Raises:
        ModelError: They do not, so answers would depend on what else is asked for.
    """
    probes = [
        Row(Generation("", prompt, Sampling(max_tokens=1), on_event=_ignore), tokenizer) for prompt in PROBE[:rows]
    ]
    batch, together = Batch.prefill(model, probes)
    for row, logits in zip(probes, together, strict=True):
        alone = Batch.prefill(model, [row])[1][0]
        if (logits - alone).abs().max() > PROBE_TOLERANCE * alone.abs().max().clamp(min=1.0):
            raise ModelError(
                f"{model.config.model_type} models give other logits for a padded row, so requests cannot be batched; "
                "serve this one with --concurrent 1"
            )
    return batch.cache_bytes() // batch._mask.numel()


def _ignore(_: Event) -> None:
    """Receives the tokens of a probe."""
