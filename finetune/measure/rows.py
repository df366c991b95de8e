"""Rows of token ids and labels: reading them, counting what is trained, grouping them into padded batches."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import EvalError

IGNORED = -100
"""Label of a token that is read and not learnt. Source: ignore_index of torch.nn.CrossEntropyLoss."""

Row = Mapping[str, Any]


def read_rows(folder: Path, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Reads the first rows of a split that the data room wrote with ``save_to_disk``.

    Args:
        folder: ``data/heldout``, say.
        limit: At most so many rows, from the top; all of them when None.

    Raises:
        EvalError: The folder is missing, or holds no row.
    """
    from datasets import load_from_disk

    if not folder.is_dir():
        raise EvalError(f"{folder} is missing, so there is nothing to measure on; run the data stage first")
    split = load_from_disk(str(folder))
    rows = [dict(row) for row in split.select(range(min(limit, len(split)) if limit is not None else len(split)))]
    if not rows:
        raise EvalError(f"{folder} holds no row, so there is nothing to measure on; raise data.heldout_rows")
    return rows


def trained_tokens(row: Row) -> int:
    """Tokens that a loss is taken on: labelled, and with something before them to be predicted from."""
    return sum(label != IGNORED for label in row["labels"][1:])


def first_rows(rows: Sequence[Row], *, tokens: int) -> list[Row]:
    """The leading rows that hold at most so many trained tokens together; always at least one row."""
    chosen: list[Row] = []
    total = 0
    for row in rows:
        total += trained_tokens(row)
        if chosen and total > tokens:
            break
        chosen.append(row)
    return chosen


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
