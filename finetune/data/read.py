"""Reads all sources, processes their rows in workers, and fills the token store."""

import gc
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import chain, islice

from finetune.console import ProgressBar, log
from finetune.data.arrow_rows import describe
from finetune.data.config import DataConfig
from finetune.data.conversation import BadRow
from finetune.data.files import Raw
from finetune.data.formats import COLUMNS, ColumnMapping, detect, unused_columns
from finetune.data.sources import Source
from finetune.data.store import TokenStore
from finetune.data.thoughts import has_thoughts
from finetune.data.worker import Processed, Worker, WorkerSettings, parse_object, read
from finetune.errors import DataError

Batch = tuple[int, list[Raw]]
"""Number of the source, and some of its rows."""

BATCH_ROWS = 500
DETECTION_ROWS = 20
THOUGHT_ROWS = 200
"""Rows of each source that are searched for thoughts."""

COLLECT_AFTER_OBJECTS = 100_000
"""Batches create many short-lived objects and few cycles; the default threshold of 700 costs a tenth of the time."""

MIN_ROWS_FOR_PROCESSES = 4000
"""For fewer rows, starting processes costs more than it saves."""

_worker: Worker | None = None
"""This process's worker. ``_start`` sets it, because a tokenizer is too large to send with every batch."""


def resolve_formats(sources: list[Source]) -> dict[int, tuple[str, ColumnMapping]]:
    """Returns the format and the column mapping of each source, and logs them once for sources that agree.

    Raises:
        DataError: A source has an unknown format, or lacks a mapped column.
    """
    formats: dict[int, tuple[str, ColumnMapping]] = {}
    messages: dict[str, list[str]] = {}
    for number, source in enumerate(sources):
        rows = [row for row in (parse_object(value) for _, value in source.rows(DETECTION_ROWS)) if row]
        _check_columns(source, rows)
        name, columns = (source.format, source.columns) if source.format != "auto" else _detect(source, rows)
        formats[number] = (name, columns)
        why = ", as set"
        if source.format == "auto":
            mapping = (
                f" ({', '.join(f'{actual} -> {column}' for column, actual in columns.items())})" if columns else ""
            )
            why = f"{mapping}, because the first rows have its columns"
        unused = unused_columns(rows, name, columns)
        rest = f"; not read: {', '.join(unused[:8])}{' ...' if len(unused) > 8 else ''}" if unused else ""
        messages.setdefault(f"format {name}{why}{rest}", []).append(source.name)
    for message, names in messages.items():
        log("data", f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}: {message}")
    return formats


def find_thoughts(sources: list[Source], formats: dict[int, tuple[str, ColumnMapping]]) -> bool:
    """Returns whether one of the first rows of a source has a thought."""
    for number, source in enumerate(sources):
        name, columns = formats[number]
        for _, value in source.rows(THOUGHT_ROWS):
            try:
                conversation = read(value, name, columns)
            except BadRow:
                continue
            if conversation.parts is None and has_thoughts(conversation):
                return True
    return False


def _detect(source: Source, rows: list[dict]) -> tuple[str, ColumnMapping]:
    if not rows:
        raise DataError(f"{source.name}: none of its first rows is an object, so its format is unknown; check the file")
    mapped = [
        {**row, **{column: row[actual] for column, actual in source.columns.items() if actual in row}} for row in rows
    ]
    try:
        name, columns = detect(mapped)
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from error
    return name, {**columns, **source.columns}


def _check_columns(source: Source, rows: list[dict]) -> None:
    columns = chain.from_iterable(COLUMNS.values()) if source.format == "auto" else COLUMNS[source.format]
    known = {*columns, "tests"}
    for column, actual in source.columns.items():
        where = f"data.columns.{column}"
        if column not in known:
            raise DataError(
                f"{where}: the format {source.format} has no such column; it has {', '.join(sorted(known))}"
            )
        if rows and not any(actual in row for row in rows):
            raise DataError(f"{where}: no column {actual!r} in {source.name}; it has {', '.join(map(str, rows[0]))}")


def fill_store(config: DataConfig, sources: list[Source], settings: WorkerSettings, store: TokenStore) -> None:
    """Processes all rows into the store, in the order of the sources for any number of processes."""
    changes = [Counter[str]() for _ in sources]
    batches = _batches(sources, config.limit, changes)
    first = list(islice(batches, max(1, MIN_ROWS_FOR_PROCESSES // BATCH_ROWS)))
    few = sum(len(raws) for _, raws in first) < MIN_ROWS_FOR_PROCESSES
    processes = 1 if few and not config.workers else config.workers or os.cpu_count() or 1
    everything = _chain(first, batches)
    with ExitStack() as stack:
        bar: ProgressBar | None = None
        for done in _in_processes(settings, everything, processes) if processes > 1 else _here(settings, everything):
            # Only now: a display that draws while processes are forked may leave them with a locked console.
            bar = bar or stack.enter_context(ProgressBar("data", unit="rows"))
            store.add(done)
            bar.advance(len(done.rows))
    for source, counted in zip(sources, changes, strict=True):
        log("data", *(f"{source.name}: {sentence}" for sentence in describe(counted)))


def _chain(first: list[Batch], rest: Iterator[Batch]) -> Iterator[Batch]:
    yield from first
    first.clear()  # itertools.chain would keep these rows in memory
    yield from rest


def _batches(sources: list[Source], limit: int | None, changes: list[Counter[str]]) -> Iterator[Batch]:
    left = {False: limit, True: limit}
    for number, source in enumerate(sources):
        rows = source.rows(left[source.heldout], changes[number])
        while batch := list(islice(rows, BATCH_ROWS)):
            yield number, batch
            if limit is not None:
                left[source.heldout] = (left[source.heldout] or 0) - len(batch)


def _here(settings: WorkerSettings, batches: Iterator[Batch]) -> Iterator[Processed]:
    worker = Worker(settings)
    for source, raws in batches:
        yield worker.process(source, raws)


def _in_processes(settings: WorkerSettings, batches: Iterator[Batch], processes: int) -> Iterator[Processed]:
    """Keeps a few batches per process in progress, and yields the results in order."""
    # Forked processes share the tokenizer's memory; spawned ones load their own.
    forked = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forked else "spawn")
    start: Worker | WorkerSettings = Worker(settings) if forked else settings
    pending: deque[Future[Processed]] = deque()
    try:
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(start,)) as pool:
            for source, raws in batches:
                pending.append(pool.submit(_process, source, raws))
                if len(pending) > 2 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a data process was killed, usually because memory ran out; try data.workers=1") from error


def _start(start: Worker | WorkerSettings) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS)
    _worker = start if isinstance(start, Worker) else Worker(start)


def _process(source: int, raws: list[Raw]) -> Processed:
    assert _worker is not None
    return _worker.process(source, raws)
