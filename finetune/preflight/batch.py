"""Documents of the prepared rows: which of them are tried, and what a collated batch teaches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from finetune.inference.rows import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

Document = dict[str, list[int]]
"""``input_ids`` and ``labels``, both of shape (tokens,)."""


def first_rows(rows: Dataset, *, count: int) -> list[dict[str, Any]]:
    """The first rows as they were prepared."""
    return [rows[number] for number in range(min(count, len(rows)))]


def largest_rows(rows: Dataset, *, count: int) -> list[dict[str, Any]]:
    """The rows that make the largest micro-batch of so many rows, longest first."""
    sizes = [sum(lengths) for lengths in rows["seq_lengths"]]
    if "rejected_input_ids" in rows.column_names:
        sizes = [size + len(other) for size, other in zip(sizes, rows["rejected_input_ids"], strict=True)]
    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    return [rows[number] for number in order[:count]]


def documents(rows: Sequence[dict[str, Any]]) -> list[Document]:
    """The documents of some rows, cut out of their packs."""
    found: list[Document] = []
    for row in rows:
        borders = [0]
        for length in row["seq_lengths"]:
            borders.append(borders[-1] + length)
        found += [{key: row[key][start:end] for key in ("input_ids", "labels")} for start, end in pairwise(borders)]
    return found


def rejected(rows: Sequence[dict[str, Any]]) -> list[Document]:
    """The rejected answers of pairs, each with its prompt."""
    return [{"input_ids": row["rejected_input_ids"], "labels": row["rejected_labels"]} for row in rows]


def shortened(document: Document, *, tokens: int) -> Document:
    """At most so many tokens, up to the last trained one."""
    end = max((number + 1 for number, label in enumerate(document["labels"]) if label != IGNORED), default=tokens)
    return {key: values[max(0, end - tokens) : end] for key, values in document.items()}


def uneven(some: Sequence[Document]) -> Iterator[Document]:
    """Every second document learns the last quarter of its answer only: a mean of means then differs from the mean."""
    for number, document in enumerate(some):
        learnt = [place for place, label in enumerate(document["labels"]) if label != IGNORED]
        first = learnt[len(learnt) * 3 // 4] if number % 2 and learnt else 0
        yield {
            **document,
            "labels": [label if place >= first else IGNORED for place, label in enumerate(document["labels"])],
        }


def as_rows(some: Sequence[Document]) -> list[dict[str, Any]]:
    """A row of the prepared data for each document."""
    return [
        {**document, "seq_lengths": [len(document["input_ids"])], "rows": [number]}
        for number, document in enumerate(some)
    ]


def learnt(document: Document) -> list[int]:
    """The tokens that a document trains; its first one never, since nothing stands before it."""
    return [label for label in document["labels"][1:] if label != IGNORED]


def collated_learnt(batch: dict[str, Any]) -> list[list[int]]:
    """The same of each document of a collated micro-batch, read from what the model is given."""
    labels = batch["labels"].tolist()
    if "cu_seq_lens_q" in batch:
        labels = [labels[0][start:end] for start, end in pairwise(batch["cu_seq_lens_q"].tolist())]
    return [[label for label in row if label != IGNORED] for row in labels]
