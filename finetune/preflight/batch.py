"""The documents that the checks run on, and the tokens that a collated batch trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from finetune.inference.rows import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

    from finetune.preflight.config import PreflightConfig

Document = dict[str, list[int]]
"""``input_ids`` and ``labels``, both of shape (tokens,)."""

MAX_TOKENS = 640
"""Upper limit on the tokens of the small batch: the original layers take more memory than fused ones."""

ACCUMULATED_TOKENS = 32
"""Tokens per row of the accumulation check on the small batch: what matters is how losses are added up."""

CANDIDATE_ROWS = 64
"""Rows from which the small batch is taken."""


@dataclass(frozen=True, kw_only=True)
class CheckRows:
    """The rows and documents that the checks run on.

    Attributes:
        documents: Documents for losses and gradients: the small batch cut to a few hundred tokens, or the whole largest
            batch.
        packed: Documents that are packed to see whether they stay isolated.
        micro_batch: The first micro-batch as it was prepared; for ``full`` the largest one.
        accumulated: Rows of which a step is made one by one and as one batch.
    """

    documents: list[Document]
    packed: list[Document]
    micro_batch: list[dict[str, Any]]
    accumulated: list[dict[str, Any]]


def choose_rows(config: PreflightConfig, rows: Dataset, *, micro_batch: int, compares: bool) -> CheckRows:
    """Chooses what the checks of a level run on.

    Args:
        config: The preflight group.
        rows: data/train.
        micro_batch: Rows of a micro-batch.
        compares: Whether the objective compares complete answers, so that they are not cut.
    """
    first = first_rows(rows, count=CANDIDATE_ROWS)
    small, batch = documents(first)[: config.rows], first[:micro_batch]
    chosen = [shortened(document, tokens=MAX_TOKENS // config.rows) for document in small]
    packed, added, tokens = chosen[:2], chosen[:2], ACCUMULATED_TOKENS
    if config.level == "full":
        batch = largest_rows(rows, count=micro_batch)
        chosen = documents(batch)
        packed, added = chosen if len(chosen) > 1 else small, small
        tokens = max(ACCUMULATED_TOKENS, sum(len(document["input_ids"]) for document in chosen) // len(added))
    accumulated = as_rows(list(uneven([shortened(document, tokens=tokens) for document in added])))
    if compares:
        accumulated = sorted(first, key=lambda row: sum(row["seq_lengths"]))[: len(added)]
    return CheckRows(documents=chosen, packed=packed, micro_batch=batch, accumulated=accumulated)


def first_rows(rows: Dataset, *, count: int) -> list[dict[str, Any]]:
    """Returns the first rows as they were prepared."""
    return [rows[number] for number in range(min(count, len(rows)))]


def largest_rows(rows: Dataset, *, count: int) -> list[dict[str, Any]]:
    """Returns the rows that make the largest micro-batch of ``count`` rows, longest first."""
    sizes = [sum(lengths) for lengths in rows["seq_lengths"]]
    if "rejected_input_ids" in rows.column_names:
        sizes = [size + len(other) for size, other in zip(sizes, rows["rejected_input_ids"], strict=True)]
    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    return [rows[number] for number in order[:count]]


def documents(rows: Sequence[dict[str, Any]]) -> list[Document]:
    """Returns the documents of the rows, unpacked."""
    unpacked: list[Document] = []
    for row in rows:
        borders = [0]
        for length in row["seq_lengths"]:
            borders.append(borders[-1] + length)
        unpacked += [{key: row[key][start:end] for key in ("input_ids", "labels")} for start, end in pairwise(borders)]
    return unpacked


def rejected(rows: Sequence[dict[str, Any]]) -> list[Document]:
    """Returns the rejected answers of pairs, each with its prompt."""
    return [{"input_ids": row["rejected_input_ids"], "labels": row["rejected_labels"]} for row in rows]


def shortened(document: Document, *, tokens: int) -> Document:
    """Cuts a document to ``tokens`` tokens, the last of which is its last trained one."""
    end = max((place + 1 for place, label in enumerate(document["labels"]) if label != IGNORED), default=tokens)
    return {key: values[max(0, end - tokens) : end] for key, values in document.items()}


def uneven(documents: Sequence[Document]) -> Iterator[Document]:
    """Masks all but the last quarter of every second answer, so that a mean of means differs from the mean."""
    for number, document in enumerate(documents):
        trained = [place for place, label in enumerate(document["labels"]) if label != IGNORED]
        first = trained[len(trained) * 3 // 4] if number % 2 and trained else 0
        labels = [label if place >= first else IGNORED for place, label in enumerate(document["labels"])]
        yield {**document, "labels": labels}


def as_rows(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Makes a row of the prepared data from each document."""
    return [
        {**document, "seq_lengths": [len(document["input_ids"])], "rows": [number]}
        for number, document in enumerate(documents)
    ]


def trained_tokens(document: Document) -> list[int]:
    """Returns the tokens that a document trains on; never its first, which nothing predicts."""
    return [label for label in document["labels"][1:] if label != IGNORED]


def trained_tokens_of_batch(batch: dict[str, Any]) -> list[list[int]]:
    """Returns the tokens that each document of a collated micro-batch trains on, read from the model's inputs."""
    labels = batch["labels"].tolist()
    if "cu_seq_lens_q" in batch:
        labels = [labels[0][start:end] for start, end in pairwise(batch["cu_seq_lens_q"].tolist())]
    return [[label for label in row if label != IGNORED] for row in labels]
