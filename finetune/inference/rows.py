"""Rows of token ids and labels: reading them, counting what is trained, grouping them into padded batches."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import EvalError

IGNORED = -100
"""Label of a token that is read and not learnt. Source: ignore_index of torch.nn.CrossEntropyLoss."""

Row = Mapping[str, Any]


def open_dataset(folder: Path) -> Any:
    """A split that the data room wrote with ``save_to_disk``: a sequence of rows that are read when they are asked for.

    Args:
        folder: ``data/heldout``, say.

    Raises:
        EvalError: The folder is missing, or holds no row.
    """
    from datasets import load_from_disk

    if not folder.is_dir():
        raise EvalError(f"{folder} is missing, so there is nothing to measure on; run the data stage first")
    split = load_from_disk(str(folder))
    if not len(split):
        raise EvalError(f"{folder} holds no row, so there is nothing to measure on; raise data.heldout_rows")
    return split


def read_rows(folder: Path, *, limit: int | None = None) -> list[dict[str, Any]]:
    """The first rows of such a split, in memory; all of them when ``limit`` is None.

    Raises:
        EvalError: The folder is missing, or holds no row.
    """
    split = open_dataset(folder)
    return [split[number] for number in range(len(split) if limit is None else min(limit, len(split)))]


def trained_tokens(row: Row) -> int:
    """Tokens that a loss is taken on: labelled, and with something before them to be predicted from."""
    return sum(label != IGNORED for label in row["labels"][1:])


def measured(rows: Sequence[Row], *, batch_tokens: int) -> list[list[int]]:
    """The batches in which rows are measured, one forward pass each: those that train a token.

    Args:
        rows: ``input_ids`` and ``labels`` each.
        batch_tokens: Padded tokens per batch.

    Returns:
        Row numbers of each batch, longest rows first.
    """
    numbers = [number for number, row in enumerate(rows) if trained_tokens(row)]
    lengths = [len(rows[number]["input_ids"]) for number in numbers]
    return [[numbers[index] for index in batch] for batch in batches(lengths, batch_tokens=batch_tokens)]


def batches(lengths: Sequence[int], *, batch_tokens: int, batch_rows: int | None = None) -> Iterator[list[int]]:
    """Groups rows of like length, longest first, so that the memory peak comes at once and padding is small.

    Args:
        lengths: Tokens per row, shape (rows,).
        batch_tokens: Padded size of a batch, rows times longest; a single longer row still makes a batch.
        batch_rows: Rows of a batch at most.

    Returns:
        Indices into ``lengths``, one list per batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batch: list[int] = []
    for index in order:
        longest = lengths[batch[0]] if batch else lengths[index]
        if batch and (longest * (len(batch) + 1) > batch_tokens or len(batch) == batch_rows):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
