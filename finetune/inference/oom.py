"""Halves batches for which memory does not suffice, and counts how often."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar, cast

from finetune.console import log
from finetune.errors import HardwareError
from finetune.files import first_error_line
from finetune.inference.adapted import free_memory
from finetune.memory import is_out_of_memory

Result = TypeVar("Result")


@dataclass(slots=True)
class Halvings:
    """Counts how often the batches of a stage were halved."""

    stage: str
    remedy: str
    count: int = 0


_active: ContextVar[Halvings | None] = ContextVar("halvings", default=None)


@contextmanager
def halve_batches(stage: str, *, remedy: str = "lower data.max_tokens or eval.max_new_tokens") -> Iterator[Halvings]:
    """Lets `in_halves` halve batches, and counts it. Outside, errors pass: training has a retry of its own.

    Args:
        stage: Title of the log lines.
        remedy: What to change where one row does not fit.
    """
    halvings = Halvings(stage, remedy)
    token = _active.set(halvings)
    try:
        yield halvings
    finally:
        _active.reset(token)


def in_halves(batches: Iterable[list[int]], compute: Callable[[list[int]], Result]) -> Iterator[Result]:
    """Computes one batch after another. Where memory runs out, halves this batch and all later ones.

    Args:
        batches: Numbers of rows, one list per batch.
        compute: Computes a batch.

    Yields:
        The result of each batch that was computed.

    Raises:
        HardwareError: Memory does not suffice for one row.
    """
    halvings, waiting = _active.get(), deque(batches)
    while waiting:
        batch = waiting.popleft()
        if halvings is None:
            yield compute(batch)
            continue
        result, problem = _attempt(compute, batch)
        if not problem:
            yield cast("Result", result)
            continue
        if len(batch) == 1:
            raise HardwareError(
                f"{halvings.stage}: memory runs out with one row at a time ({problem}); "
                f"{halvings.remedy}, or free some memory"
            )
        free_memory()
        halvings.count += 1
        log(halvings.stage, f"out of memory with {len(batch)} rows ({problem}): continues with half of each batch")
        waiting = deque(half for later in [batch, *waiting] for half in _halves(later))


def _attempt(compute: Callable[[list[int]], Result], batch: list[int]) -> tuple[Result | None, str]:
    """Returns the result, or the allocator's message; returning frees the tensors that the traceback keeps alive."""
    try:
        return compute(batch), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, first_error_line(error) or type(error).__name__


def _halves(batch: list[int]) -> list[list[int]]:
    middle = -(-len(batch) // 2)
    return [half for half in (batch[:middle], batch[middle:]) if half]
