"""Documents read back from disk, as text with the learnt stretches marked: what training will really see."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

from finetune.data.tokens import IGNORED


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a split.

    Attributes:
        row: Its line in the ledger.
        ids: Token ids.
        learnt: Whether each token carries loss.
    """

    row: int
    ids: list[int]
    learnt: list[bool]


class SplitFile:
    """``train/`` or ``heldout/``, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        source = pyarrow.memory_map(str(folder / "data-00000-of-00001.arrow"))
        self.table = pyarrow.ipc.open_stream(source).read_all()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def documents(self, pack: int) -> Iterator[Document]:
        """The documents of one packed row, in order."""
        row = self.table.slice(pack, 1).to_pylist()[0]
        start = 0
        for length, number in zip(row["seq_lengths"], row["rows"], strict=True):
            end = start + length
            yield Document(number, row["input_ids"][start:end], [label != IGNORED for label in row["labels"][start:end]])
            start = end

    def at(self, pack: int, position: int) -> Document:
        """The document that begins at a position of a packed row."""
        start = 0
        for document in self.documents(pack):
            if start == position:
                return document
            start += len(document.ids)
        raise AssertionError(f"the ledger names position {position} of row {pack}, where no document begins")


def runs(document: Document, tokenizer: Any) -> list[tuple[str, bool]]:
    """Text in stretches with whether each is learnt; a character split over tokens stays whole within a stretch."""
    stretches: list[tuple[list[int], bool]] = []
    for token, learnt in zip(document.ids, document.learnt, strict=True):
        if not stretches or stretches[-1][1] != learnt:
            stretches.append(([], learnt))
        stretches[-1][0].append(token)
    return [(tokenizer.decode(ids, skip_special_tokens=False), learnt) for ids, learnt in stretches]
