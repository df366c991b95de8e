"""Reads prepared rows, counts their trained tokens, and groups them into padded batches."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import EvalError
from finetune.inference.budget import Workload

IGNORED = -100
"""Label of a token without loss. Source: the default ignore_index of torch.nn.CrossEntropyLoss."""

Row = Mapping[str, Any]


def open_dataset(folder: Path) -> Any:
    """Opens a split of the prepared data: a sequence of rows that are read on access.

    Args:
        folder: For example ``data/heldout``.

    Raises:
        EvalError: The folder is missing or contains no rows.
    """
    from datasets import load_from_disk

    if not folder.is_dir():
        raise EvalError(f"{folder} is missing, so there is nothing to evaluate on; run the data stage first")
    split = load_from_disk(str(folder))
    if not len(split):
        raise EvalError(f"{folder} contains no rows, so there is nothing to evaluate on; raise data.heldout_rows")
    return split


def read_rows(folder: Path, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Reads the first ``limit`` rows of a split, or all, into memory.

    A text, which is trained on from its first token, gets its first half as prompt.

    Raises:
        EvalError: The folder is missing or contains no rows.
    """
    split = open_dataset(folder)
    count = len(split) if limit is None else min(limit, len(split))
    return [_with_prompt(split[number]) for number in range(count)]


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("prompt_ids") != []:
        return row
    return row | {"prompt_ids": row["input_ids"][: max(1, len(row["input_ids"]) // 2)]}


def trained_tokens(row: Row) -> int:
    """Counts the tokens with loss: they have a label and a token before them."""
    return sum(label != IGNORED for label in row["labels"][1:])


def token_batches(rows: Sequence[Row], *, batch_tokens: int) -> list[list[int]]:
    """Groups the rows with loss into batches for one forward pass each.

    Args:
        rows: Each with ``input_ids`` and ``labels``.
        batch_tokens: Padded tokens per batch.

    Returns:
        The row numbers of each batch, longest rows first.
    """
    numbers = [number for number, row in enumerate(rows) if trained_tokens(row)]
    lengths = [len(rows[number]["input_ids"]) for number in numbers]
    return [[numbers[index] for index in batch] for batch in group_by_length(lengths, batch_tokens=batch_tokens)]


def loss_workload(rows: Sequence[Row], *, batch_tokens: int) -> Workload:
    """Returns the forward passes that the losses of these rows take."""
    batches = token_batches(rows, batch_tokens=batch_tokens)
    sizes = [len(batch) * len(rows[batch[0]]["input_ids"]) for batch in batches]
    return Workload(pass_tokens=max(sizes, default=0), passes=len(sizes))


def group_by_length(lengths: Sequence[int], *, batch_tokens: int) -> Iterator[list[int]]:
    """Groups rows of similar length, longest first: the memory peak comes first, and padding is small.

    Args:
        lengths: Tokens per row, shape (rows,).
        batch_tokens: Largest padded size of a batch, rows times longest; a single longer row is a batch of its own.

    Yields:
        Indices into ``lengths``, one list per batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batch: list[int] = []
    for index in order:
        longest = lengths[batch[0]] if batch else lengths[index]
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
