"""The order of the rows, where micro-batches are made of rows of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ByLength(Sampler[int]):
    """A random order in which the rows of each optimizer step stand longest first.

    Sorting never crosses a step, so every step reads the rows that it would read without sorting; and the order depends
    on seed and epoch alone, so a resumed run finds it again. (transformers' own sampler draws from the global generator,
    which a resumed run has in another state.)

    Args:
        lengths: Tokens of each row.
        rows_per_step: Rows that one optimizer step reads.
        seed: Seeds the order.
    """

    def __init__(self, lengths: Sequence[int], *, rows_per_step: int, seed: int) -> None:
        self.lengths, self.rows_per_step, self.seed, self.epoch = lengths, rows_per_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Accelerate calls it before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for start in range(0, len(order), self.rows_per_step):
            yield from sorted(order[start : start + self.rows_per_step], key=lambda row: -self.lengths[row])
