"""Packs documents into rows by best-fit decreasing: each goes into the fullest row that it still fits into."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from finetune.data.scratch import Scratch


@dataclass(frozen=True, slots=True)
class Packs:
    """Packed rows of documents.

    Attributes:
        documents: Document numbers, row after row.
        starts: Where each row begins in ``documents``; one more entry than rows.
    """

    documents: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def part(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents of some rows, and where each of these rows begins in them, with the end."""
        starts = self.starts[rows.start : rows.stop + 1]
        return self.documents[starts[0] : starts[-1]], starts - starts[0]


def one_per_row(documents: np.ndarray, scratch: Scratch) -> Packs:
    """Puts each document into a row of its own, in order."""
    starts = scratch.array(np.int64, len(documents) + 1)
    for part in scratch.slices(len(starts)):
        starts[part] = np.arange(part.start, part.stop)
    return Packs(documents, starts)


def pack(
    documents: np.ndarray, lengths: np.ndarray, *, capacity: int, generator: np.random.Generator, scratch: Scratch
) -> Packs:
    """Fills rows of ``capacity`` tokens.

    Args:
        documents: Numbers of the documents.
        lengths: Tokens of every document by its number, at most ``capacity``.
        generator: Shuffles the rows, which would otherwise be ordered by length.

    Source: best-fit decreasing needs at most 11/9 of the fewest rows plus one (Johnson, 1973). A big integer with one
    bit per amount of free space finds the best row without a search.
    """
    order, _ = scratch.grouped(documents, lambda part: capacity - lengths[documents[part]], groups=capacity)
    rows = scratch.collect(_place(order, lengths, capacity, scratch))
    count = 1 + max((int(rows[part].max()) for part in scratch.slices(len(rows))), default=-1)
    places = _shuffled_places(count, generator, scratch)
    return Packs(*scratch.grouped(order, lambda part: places[rows[part]], groups=count))


def _place(order: np.ndarray, lengths: np.ndarray, capacity: int, scratch: Scratch) -> Iterator[np.ndarray]:
    """Yields the row of each document, in the order given."""
    rows_by_space: dict[int, array[int]] = {}
    spaces = count = 0
    for part in scratch.slices(len(order)):
        rows = array("q")
        for length in lengths[order[part]].tolist():
            fitting = spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                candidates = rows_by_space[space]
                row = candidates.pop()
                if not candidates:
                    spaces ^= 1 << space
            else:
                space, row = capacity, count
                count += 1
            rows.append(row)
            left = space - length
            if left:
                rows_by_space.setdefault(left, array("q")).append(row)
                spaces |= 1 << left
        yield np.array(rows, np.int64)


def _shuffled_places(count: int, generator: np.random.Generator, scratch: Scratch) -> np.ndarray:
    """Returns the place of each row after a shuffle."""
    permutation, places = scratch.array(np.int64, count), scratch.array(np.int64, count)
    for part in scratch.slices(count):
        permutation[part] = np.arange(part.start, part.stop)
    generator.shuffle(np.asarray(permutation))
    for part in scratch.slices(count):
        places[permutation[part]] = np.arange(part.start, part.stop)
    return places
