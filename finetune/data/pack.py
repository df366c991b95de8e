"""Best-fit decreasing: every document goes into the fullest row that still has room."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Packs:
    """Rows of documents.

    Attributes:
        documents: Document numbers, pack after pack.
        starts: Where each pack begins in ``documents``; one more entry than packs.
    """

    documents: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


def alone(documents: np.ndarray) -> Packs:
    """One document per row, in their order."""
    return Packs(documents, np.arange(len(documents) + 1))


def pack(documents: np.ndarray, lengths: np.ndarray, *, capacity: int, generator: np.random.Generator) -> Packs:
    """Fills rows of ``capacity`` tokens.

    Args:
        documents: Numbers of the documents.
        lengths: Their tokens, none above ``capacity``.
        generator: Shuffles the rows, which would otherwise come ordered by length.

    Source: best-fit decreasing needs at most 11/9 of the fewest rows plus one (Johnson, 1973). A big integer with one
    bit per amount of room finds the tightest row without a search.
    """
    order = np.argsort(-lengths, kind="stable")
    members: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for document, length in zip(documents[order].tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            waiting = by_room[room]
            row = waiting.pop()
            if not waiting:
                rooms ^= 1 << room
            members[row].append(document)
        else:
            room, row = capacity, len(members)
            members.append([document])
        left = room - length
        if left:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    shuffled = [members[row] for row in generator.permutation(len(members))]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in shuffled])]).astype(np.int64)
    return Packs(np.array([document for row in shuffled for document in row], dtype=np.int64), starts)
