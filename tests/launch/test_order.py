"""The deal of rows: every process takes the same steps as one alone would, and no row comes twice."""

import math

import pytest

from finetune.train.sampler import StepBatchSampler

LENGTHS = [7, 3, 9, 1, 5, 2, 8, 6, 4, 11]


def steps(
    processes: int, *, rows: int = 10, rows_per_step: int = 4, micro_batch: int = 1, lengths: list[int] | None = None
) -> list[list[int]]:
    """Rows of each step, all processes together; each must make as many micro-batches as the others."""
    own = []
    for process in range(processes):
        order = StepBatchSampler(
            rows,
            rows_per_step=rows_per_step,
            micro_batch=micro_batch,
            seed=3,
            lengths=lengths,
            process=process,
            processes=processes,
        )
        batches = list(order)
        assert len(batches) == len(order)
        assert all(len(batch) <= micro_batch for batch in batches)
        own.append(batches)
    assert len({len(batches) for batches in own}) == 1
    found, position = [], 0
    for start in range(0, rows, rows_per_step):
        count = math.ceil(math.ceil(min(rows_per_step, rows - start) / processes) / micro_batch)
        found.append(sorted(row for batches in own for batch in batches[position : position + count] for row in batch))
        position += count
    return found


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "rows_per_step", "micro_batch"), [(10, 4, 1), (10, 4, 2), (9, 6, 4), (8, 4, 2), (5, 8, 3)]
)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["random", "by length"])
def test_each_step_reads_the_rows_that_one_process_would_read_once_each(
    processes: int, rows: int, rows_per_step: int, micro_batch: int, lengths: list[int] | None
) -> None:
    settings = {"rows": rows, "rows_per_step": rows_per_step, "micro_batch": micro_batch, "lengths": lengths}
    together, alone = steps(processes, **settings), steps(1, **settings)
    assert together == alone
    assert sorted(row for step in together for row in step) == list(range(rows))


def test_process_without_rows_in_the_last_step_makes_an_empty_micro_batch() -> None:
    last = [
        list(StepBatchSampler(9, rows_per_step=4, micro_batch=1, seed=3, process=process, processes=2))[-1]
        for process in range(2)
    ]
    assert sorted(map(len, last)) == [0, 1]
