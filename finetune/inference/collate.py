"""Collates prepared rows into a micro-batch: documents concatenated in one row, or each padded in its own row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from finetune.inference.rows import IGNORED

FLAT_MULTIPLE = 64
"""Flat rows are padded to a multiple of this: a CPU's matrix library keeps code and memory for every shape, which took
0.6 GB after 15 steps of a small model."""


@dataclass(frozen=True, slots=True)
class Collator:
    """Collator of packed or unpacked rows.

    Attributes:
        flat: Concatenates all documents in one row, separated by positions that restart, which the attention must
            support; the padding is one more document. Otherwise every document has a row of its own, packed or not.
        pad_token_id: Pads the rows, masked and without loss.
    """

    flat: bool
    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collates rows.

        Args:
            rows: ``input_ids``, ``labels``, ``seq_lengths`` (documents of the row) and ``rows`` (their ledger numbers).

        Returns:
            ``input_ids`` and ``labels``: shape (1, tokens) with ``position_ids`` and the document borders for
            variable-length kernels, or (documents, longest) with ``attention_mask``. The first token of a document has
            no label, because it has no token before it. ``padding`` is the number of padding tokens.
        """
        documents = [document for row in rows for document in split_documents(row)]
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
        for number, (ids, document_labels) in enumerate(documents):
            input_ids[number, : len(ids)] = torch.tensor(ids)
            labels[number, : len(ids)] = torch.tensor(document_labels)
            mask[number, : len(ids)] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "padding": int((mask == 0).sum())}


def split_documents(row: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the tokens and the labels of each document of a row."""
    borders = [0]
    for length in row["seq_lengths"]:
        borders.append(borders[-1] + length)
    for start, end in pairwise(borders):
        yield row["input_ids"][start:end], [IGNORED, *row["labels"][start + 1 : end]]
