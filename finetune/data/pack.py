"""Packs documents into rows by best-fit decreasing: each goes into the fullest row that it still fits into."""

from dataclasses import dataclass

import numpy as np


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


def one_per_row(documents: np.ndarray) -> Packs:
    """Puts each document into a row of its own, in order."""
    return Packs(documents, np.arange(len(documents) + 1))


def pack(documents: np.ndarray, lengths: np.ndarray, *, capacity: int, generator: np.random.Generator) -> Packs:
    """Fills rows of ``capacity`` tokens.

    Args:
        documents: Numbers of the documents.
        lengths: Tokens of each document, at most ``capacity``.
        generator: Shuffles the rows, which would otherwise be ordered by length.

    Source: best-fit decreasing needs at most 11/9 of the fewest rows plus one (Johnson, 1973). A big integer with one
    bit per amount of free space finds the best row without a search.
    """
    order = np.argsort(-lengths, kind="stable")
    members: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces = 0
    for document, length in zip(documents[order].tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            candidates = rows_by_space[space]
            row = candidates.pop()
            if not candidates:
                spaces ^= 1 << space
            members[row].append(document)
        else:
            space, row = capacity, len(members)
            members.append([document])
        left = space - length
        if left:
            rows_by_space.setdefault(left, []).append(row)
            spaces |= 1 << left
    shuffled = [members[row] for row in generator.permutation(len(members))]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in shuffled])]).astype(np.int64)
    return Packs(np.array([document for row in shuffled for document in row], dtype=np.int64), starts)
