"""Which rows a process puts into which micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class StepBatchSampler(Sampler[list[int]]):
    """Micro-batches of one process, in a random order that every process of a launch agrees on.

    The rows of an optimizer step are decided first, by seed and epoch alone, and dealt to the processes then.
    So each step reads the rows that one process alone would read, each of them once; a process that gets fewer in the
    last step of an epoch makes empty micro-batches, which keep it in step with the others. A resumed run finds the order
    again, on as many processes as it likes.

    Args:
        rows: How many there are.
        rows_per_step: Rows that one optimizer step reads, over all processes.
        micro_batch: Rows that go through the model at once.
        seed: Seeds the order.
        lengths: Tokens of each row. Where they are given, the rows of a step stand longest first, so that micro-batches
            are of like length; sorting never crosses a step.
        process: This process, 0 for the first.
        processes: All of them.
    """

    def __init__(
        self, rows: int, *, rows_per_step: int, micro_batch: int, seed: int, lengths: Sequence[int] | None = None, process: int = 0,
        processes: int = 1,
    ) -> None:  # fmt: skip
        self.rows, self.rows_per_step, self.micro_batch, self.seed, self.lengths = (
            rows,
            rows_per_step,
            micro_batch,
            seed,
            lengths,
        )
        self.process, self.processes, self.epoch = process, processes, 0

    def set_epoch(self, epoch: int) -> None:
        """transformers calls it before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.rows_per_step)
        return whole * self._micro_batches(self.rows_per_step) + self._micro_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for start in range(0, self.rows, self.rows_per_step):
            step = order[start : start + self.rows_per_step]
            if self.lengths is not None:
                lengths = self.lengths
                step.sort(key=lambda row: -lengths[row])
            own = self._deal(step)
            for number in range(self._micro_batches(len(step))):
                yield own[number * self.micro_batch : (number + 1) * self.micro_batch]

    def _deal(self, step: list[int]) -> list[int]:
        """This process's rows of a step: whole micro-batches where these come out even, so that each is computed as one process
        alone would compute it, else one by one, so that none has much more to do than another."""
        width = self.micro_batch if len(step) % (self.micro_batch * self.processes) == 0 else 1
        stride = width * self.processes
        return [row for start in range(self.process * width, len(step), stride) for row in step[start : start + width]]

    def _micro_batches(self, rows: int) -> int:
        """Micro-batches that each process makes of so many rows of a step: as many as the one with the most rows needs."""
        return micro_batches(rows, micro_batch=self.micro_batch, processes=self.processes)


def micro_batches(rows: int, *, micro_batch: int, processes: int) -> int:
    """Micro-batches of a process in a step of so many rows over all processes."""
    return math.ceil(math.ceil(rows / processes) / micro_batch)
