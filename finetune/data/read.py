"""All sources through the workers, into the store."""

import gc
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from tqdm import tqdm

from finetune.console import log
from finetune.data.config import DataConfig
from finetune.data.files import Raw
from finetune.data.formats import COLUMNS, detect, unread
from finetune.data.sources import Source
from finetune.data.store import Store
from finetune.data.worker import Job, Processed, Worker, as_object
from finetune.errors import DataError

BATCH_ROWS = 500
LOOK_AT_ROWS = 20
COLLECT_AFTER_OBJECTS = 100_000
"""Batches make many short-lived objects and few cycles, so looking for cycles at the usual 700 is a tenth of the time."""

ROWS_WORTH_PROCESSES = 4000
"""Below this, starting processes costs more than it saves."""

_worker: Worker | None = None
"""Of this process; set once by ``_begin`` in each worker process, since a tokenizer is too large to send with every batch."""


def formats_of(sources: list[Source]) -> dict[int, tuple[str, dict[str, str]]]:
    """The format and column mapping of each source, said once for sources that agree.

    Raises:
        DataError: A source looks like nothing known, or lacks a mapped column.
    """
    chosen: dict[int, tuple[str, dict[str, str]]] = {}
    said: dict[str, list[str]] = {}
    for number, source in enumerate(sources):
        rows = [row for row in (as_object(value) for _, value in source.rows(LOOK_AT_ROWS)) if row]
        _check_columns(source, rows)
        if source.format != "auto":
            chosen[number] = (source.format, source.columns)
            said.setdefault(f"format {source.format}, as asked{_left(rows, *chosen[number])}", []).append(source.name)
            continue
        if not rows:
            raise DataError(
                f"{source.name}: none of its first rows is an object, so its format cannot be seen; check the file"
            )
        mapped = [
            {**row, **{ours: row[actual] for ours, actual in source.columns.items() if actual in row}} for row in rows
        ]
        try:
            name, columns = detect(mapped)
        except DataError as error:
            raise DataError(f"{source.name}: {error}") from error
        columns = {**columns, **source.columns}
        chosen[number] = (name, columns)
        mapping = f" ({', '.join(f'{actual} -> {ours}' for ours, actual in columns.items())})" if columns else ""
        said.setdefault(
            f"format {name}{mapping}, because the first rows have its columns{_left(rows, name, columns)}", []
        ).append(source.name)
    for sentence, names in said.items():
        log("data", f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}: {sentence}")
    return chosen


def _left(rows: list[dict], name: str, columns: dict[str, str]) -> str:
    left = unread(rows, name, columns)
    return f"; not read: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''}" if left else ""


def _check_columns(source: Source, rows: list[dict]) -> None:
    known = (
        {name for names in COLUMNS.values() for name in names}
        if source.format == "auto"
        else set(COLUMNS[source.format])
    )
    known.add("tests")
    for ours, actual in source.columns.items():
        if ours not in known:
            raise DataError(
                f"data.columns.{ours}: the format {source.format} has no such column; it has {', '.join(sorted(known))}"
            )
        if rows and not any(actual in row for row in rows):
            raise DataError(
                f"data.columns.{ours}: no column {actual!r} in {source.name}; it has {', '.join(map(str, rows[0]))}"
            )


def run(config: DataConfig, sources: list[Source], job: Job, store: Store) -> None:
    """Fills the store, in the order of the sources whatever the number of processes."""
    batches = _batches(sources, config.limit)
    first = list(islice(batches, max(1, ROWS_WORTH_PROCESSES // BATCH_ROWS)))
    few = sum(len(raws) for _, raws in first) < ROWS_WORTH_PROCESSES
    processes = 1 if few and not config.workers else config.workers or os.cpu_count() or 1
    everything = _chain(first, batches)
    with tqdm(desc="data: rows", unit=" rows", file=sys.stderr, delay=1, unit_scale=True) as bar:
        for done in _in_processes(job, everything, processes) if processes > 1 else _here(job, everything):
            store.add(done)
            bar.update(len(done.rows))


def _chain(
    first: list[tuple[int, list[Raw]]], rest: Iterator[tuple[int, list[Raw]]]
) -> Iterator[tuple[int, list[Raw]]]:
    yield from first
    first.clear()
    yield from rest


def _batches(sources: list[Source], limit: int | None) -> Iterator[tuple[int, list[Raw]]]:
    left = {False: limit, True: limit}
    for number, source in enumerate(sources):
        rows = source.rows(left[source.heldout])
        while batch := list(islice(rows, BATCH_ROWS)):
            yield number, batch
            if limit is not None:
                left[source.heldout] = (left[source.heldout] or 0) - len(batch)


def _here(job: Job, batches: Iterator[tuple[int, list[Raw]]]) -> Iterator[Processed]:
    worker = Worker(job)
    for source, raws in batches:
        yield worker.process(source, raws)


def _in_processes(job: Job, batches: Iterator[tuple[int, list[Raw]]], processes: int) -> Iterator[Processed]:
    """Keeps a few batches per process under way; results come in order."""
    # Forked processes share the tokenizer's memory; elsewhere each makes its own.
    forked = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forked else "spawn")
    start: Worker | Job = Worker(job) if forked else job
    pending: deque[Future[Processed]] = deque()
    try:
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(start,)) as pool:
            for source, raws in batches:
                pending.append(pool.submit(_process, source, raws))
                if len(pending) > 2 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a data process was killed, usually for want of memory; try data.workers=1") from error


def _begin(start: Worker | Job) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS)
    _worker = start if isinstance(start, Worker) else Worker(start)


def _process(source: int, raws: list[Raw]) -> Processed:
    assert _worker is not None
    return _worker.process(source, raws)
