"""Decides which rows a process puts into which micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class StepBatchSampler(Sampler[list[int]]):
    """Micro-batches of one process, in a random order that all processes of a launch share.

    The rows of an optimizer step depend on seed and epoch alone, and are then divided among the processes. So each step
    reads the rows that a single process would read, each of them once, and a resumed run may have another number of
    processes. A process that gets fewer rows in the last step of an epoch makes empty micro-batches, so that it takes
    part in the same collectives as the others.

    Args:
        rows: Number of rows.
        rows_per_step: Rows that one optimizer step reads, over all processes.
        micro_batch: Rows of one forward pass.
        seed: Seeds the order.
        group: Answers to each row; a micro-batch then holds answers, and ``index`` stands for answer ``index % group``
            of row ``index // group``.
        lengths: Tokens of each row. If given, the rows of each step are sorted longest first, so that the rows of a
            micro-batch have similar lengths; no row moves to another step.
        process: Rank of this process.
        processes: Number of processes.
    """

    def __init__(
        self,
        rows: int,
        *,
        rows_per_step: int,
        micro_batch: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        process: int = 0,
        processes: int = 1,
        group: int = 1,
    ) -> None:
        self.group = group
        self.rows, self.rows_per_step, self.micro_batch = rows, rows_per_step, micro_batch
        self.seed, self.lengths = seed, lengths
        self.process, self.processes, self.epoch = process, processes, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; transformers calls this before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        steps, rest = divmod(self.rows, self.rows_per_step)
        return steps * self.micro_batches(self.rows_per_step) + self.micro_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for start in range(0, self.rows, self.rows_per_step):
            step = order[start : start + self.rows_per_step]
            if self.lengths is not None:
                lengths = self.lengths
                step.sort(key=lambda row: -lengths[row])
            step = [row * self.group + number for row in step for number in range(self.group)]
            share = self._share(step)
            for number in range(micro_batches(len(step), micro_batch=self.micro_batch, processes=self.processes)):
                yield share[number * self.micro_batch : (number + 1) * self.micro_batch]

    def _share(self, step: list[int]) -> list[int]:
        """Returns this process's rows of a step.

        Whole micro-batches where they divide evenly, so that each holds the rows that it would hold on a single
        process; otherwise single rows, so that the processes have about the same amount of work.
        """
        width = self.micro_batch if len(step) % (self.micro_batch * self.processes) == 0 else 1
        stride = width * self.processes
        return [row for start in range(self.process * width, len(step), stride) for row in step[start : start + width]]

    def micro_batches(self, rows: int, *, micro_batch: int | None = None) -> int:
        """Returns each process's micro-batches in a step of ``rows`` rows; None keeps their size."""
        return micro_batches(rows * self.group, micro_batch=micro_batch or self.micro_batch, processes=self.processes)


def micro_batches(rows: int, *, micro_batch: int, processes: int) -> int:
    """Returns each process's micro-batches in a step of ``rows`` rows: those of the process with the most rows."""
    return math.ceil(math.ceil(rows / processes) / micro_batch)
