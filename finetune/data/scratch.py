"""Keeps arrays and sorted keys in files, so that memory does not grow with their number.

Example::

    scratch = Scratch(Path("outputs/mine/data/.work"))
    split = scratch.array(np.int8, rows)
    for part in scratch.slices(rows):
        split[part] = 1
    with scratch.keys() as keys:
        keys.add(numbers, hashes)
        for first, repeats in keys.repeats():
            print(first, repeats)
    scratch.delete()
"""

import mmap
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

CHUNK_ROWS = 50_000
CACHE_KIB = 16 * 1024
"""Memory of a database. SQLite sorts this much at a time and merges the parts from files."""


class Scratch:
    """A folder of arrays that are mapped into memory and of sorted keys, both deleted with it."""

    def __init__(self, folder: Path) -> None:
        if folder.exists():  # of a process that was killed
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        self.folder = folder
        self._maps: list[np.memmap] = []
        self._names = count()

    def file(self) -> Path:
        """Returns a new file name in the folder."""
        return self.folder / f"scratch-{next(self._names)}"

    def array(self, dtype: DTypeLike, size: int, *, fill: int = 0) -> np.ndarray:
        """Creates an array of shape (size,)."""
        file = self.file()
        with open(file, "wb") as handle:
            handle.truncate(size * np.dtype(dtype).itemsize)
        array = self.map(file, dtype)
        for part in self.slices(size if fill else 0):
            array[part] = fill
        return array

    def collect(self, chunks: Iterator[np.ndarray], dtype: DTypeLike = np.int64) -> np.ndarray:
        """Joins chunks into one array."""
        file = self.file()
        with open(file, "wb") as handle:
            for chunk in chunks:
                np.asarray(chunk, dtype).tofile(handle)
        return self.map(file, dtype)

    def map(self, file: Path, dtype: DTypeLike, *, columns: int = 0) -> np.ndarray:
        """Opens a file as an array, of shape (size / columns, columns) where ``columns`` is not 0."""
        shape = (-1, columns) if columns else (-1,)
        if not file.stat().st_size:
            return np.zeros(0, dtype).reshape((0, columns) if columns else (0,))
        array = np.memmap(file, dtype=dtype, mode="r+")
        self._maps.append(array)
        return array.reshape(shape)

    def slices(self, size: int, step: int = 0) -> Iterator[slice]:
        """Yields the slices of an array, and gives back the memory of each before the next."""
        step = step or CHUNK_ROWS
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))
            self.release()

    def release(self) -> None:
        """Gives back the memory of all mapped pages. Their content stays in the files."""
        for array in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def grouped(
        self, numbers: np.ndarray, group_of: Callable[[slice], np.ndarray], *, groups: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Orders numbers by their group, those of one group as they are.

        Args:
            group_of: Returns the groups of a slice of ``numbers``, each at least 0 and less than ``groups``.

        Returns:
            The numbers, and where each group begins in them; one more entry than groups.
        """
        starts, free = (self.array(np.int64, groups + 1) for _ in range(2))
        for part in self.slices(len(numbers)):
            np.add.at(starts, group_of(part) + 1, 1)
        total = 0
        for part in self.slices(groups + 1):
            starts[part] = free[part] = total + np.cumsum(starts[part])
            total = int(starts[part.stop - 1])
        ordered = self.array(np.int64, len(numbers))
        for part in self.slices(len(numbers)):
            group = group_of(part)
            by_group = np.argsort(group, kind="stable")
            group = group[by_group]
            rank = np.arange(len(group)) - np.searchsorted(group, group)
            ordered[free[group] + rank] = numbers[part][by_group]
            np.add.at(free, group, 1)
        return ordered, starts

    @contextmanager
    def keys(self) -> Iterator["Keys"]:
        """Yields an empty table of keys, which is deleted at the end."""
        file = self.file()
        with database(file) as connection:
            yield Keys(connection)
        file.unlink()

    def delete(self) -> None:
        """Deletes the folder."""
        self._maps.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class Keys:
    """Numbers, each under one or two 64-bit keys, sorted by SQLite outside of memory."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute("CREATE TABLE keys (first INTEGER, second INTEGER, number INTEGER)")

    def add(self, numbers: np.ndarray, first: np.ndarray, second: np.ndarray | None = None) -> None:
        """Adds numbers under their unsigned keys."""
        second = np.zeros(len(numbers), np.uint64) if second is None else second
        columns = (_signed(first).tolist(), _signed(second).tolist(), numbers.tolist())
        self._connection.executemany("INSERT INTO keys VALUES (?, ?, ?)", zip(*columns, strict=True))

    def in_order(self, *, start: int = 0, size: int = -1) -> Iterator[np.ndarray]:
        """Yields the numbers in the order of their keys, those of equal keys as they were added.

        Args:
            start: Of all numbers in order, the first one to yield.
            size: How many; -1 for all.
        """
        query = "SELECT number FROM keys ORDER BY first, second, rowid LIMIT ? OFFSET ?"
        for (numbers,) in self._select(query, size, start):
            yield numbers

    def repeats(self) -> Iterator[np.ndarray]:
        """Yields numbers whose keys were added before, each after the first number of the same keys: shape (2, n)."""
        query = (
            "SELECT original, number FROM (SELECT number, rowid AS place, "
            "first_value(number) OVER same AS original, min(rowid) OVER same AS earliest FROM keys "
            "WINDOW same AS (PARTITION BY first, second ORDER BY rowid)) WHERE place <> earliest"
        )
        yield from self._select(query)

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields all different keys in order, and how many numbers each has."""
        query = "SELECT first, second, count(*) FROM keys GROUP BY first, second"
        for first, second, counts in self._select(query):
            yield _unsigned(first), _unsigned(second), counts

    def _select(self, query: str, *values: int) -> Iterator[np.ndarray]:
        """Yields chunks of a result, of shape (columns, rows)."""
        cursor = self._connection.execute(query, values)
        while rows := cursor.fetchmany(CHUNK_ROWS):
            yield np.array(rows, np.int64).T


@contextmanager
def database(file: Path) -> Iterator[sqlite3.Connection]:
    """Opens a database for scratch values: nothing is kept if the process ends."""
    connection = sqlite3.connect(file, isolation_level=None)
    folder = str(file.parent).replace("'", "''")
    settings: dict[str, Any] = {
        "journal_mode": "OFF",
        "synchronous": "OFF",
        "locking_mode": "EXCLUSIVE",
        "cache_size": -CACHE_KIB,
        "temp_store": "FILE",
        "temp_store_directory": f"'{folder}'",  # sorting must not fill the system's folder, which may be memory
    }
    try:
        for name, value in settings.items():
            connection.execute(f"PRAGMA {name} = {value}")
        connection.execute("BEGIN")
        yield connection
    finally:
        connection.close()


def _signed(keys: np.ndarray) -> np.ndarray:
    """Maps unsigned keys to SQLite's signed integers, in the same order."""
    return (keys.astype(np.uint64) ^ np.uint64(1 << 63)).view(np.int64)


def _unsigned(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys).view(np.uint64) ^ np.uint64(1 << 63)
