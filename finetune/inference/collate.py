"""Rows of the prepared data as one micro-batch: documents end to end, or each padded in a row of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from finetune.inference.rows import IGNORED

FLAT_MULTIPLE = 64
"""A flat row is filled up to a multiple of so many tokens: a CPU's matrix library keeps code and memory for each shape it meets,
which was 0.6 GB after 15 steps of a small model."""


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes micro-batches.

    Attributes:
        flat: All documents end to end in one row, kept apart by positions that restart; needs an attention that heeds
            them. What fills the row up is a document of its own. Otherwise every document has a row of its own, packed or not.
        pad_token_id: Fills the rows up; masked, and never learnt.
    """

    flat: bool
    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows: ``input_ids``, ``labels``, ``seq_lengths`` (documents of the row) and ``rows`` (their ledger numbers).

        Returns:
            ``input_ids`` and ``labels``, shape (1, tokens) with ``position_ids`` and the borders of the documents that
            variable-length kernels take, or (documents, longest) with ``attention_mask``. The first token of a document
            is never a label: nothing stands before it. ``padding`` counts the tokens that fill up.
        """
        documents = [document for row in rows for document in _documents(row)]
        return self._flat(documents) if self.flat else self._padded(documents)

    def _flat(self, documents: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
        padding = -sum(len(ids) for ids, _ in documents) % FLAT_MULTIPLE
        if padding:
            documents = [*documents, ([self.pad_token_id] * padding, [IGNORED] * padding)]
        lengths = [len(ids) for ids, _ in documents]
        borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return {
            "input_ids": torch.tensor([[token for ids, _ in documents for token in ids]]),
            "labels": torch.tensor([[label for _, labels in documents for label in labels]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "padding": padding,
        }

    def _padded(self, documents: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
        shape = (len(documents), max(len(ids) for ids, _ in documents))
        input_ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for number, (ids, learnt) in enumerate(documents):
            input_ids[number, : len(ids)] = torch.tensor(ids)
            labels[number, : len(ids)] = torch.tensor(learnt)
            mask[number, : len(ids)] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "padding": int((mask == 0).sum())}


def _documents(row: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    borders = [0]
    for length in row["seq_lengths"]:
        borders.append(borders[-1] + length)
    for start, end in pairwise(borders):
        yield row["input_ids"][start:end], [IGNORED, *row["labels"][start + 1 : end]]
