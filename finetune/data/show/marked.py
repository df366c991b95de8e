"""Documents read back from disk, as text with the learnt stretches marked: what training will really see."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from finetune.data.tokens import IGNORED


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a split.

    Attributes:
        row: Its line in the ledger.
        ids: Token ids.
        learnt: Whether each token carries loss.
        rejected: The worse answer with its prompt, for preference objectives.
        desirable: For unpaired preference: whether the answer is a good one.
    """

    row: int
    ids: list[int]
    learnt: list[bool]
    rejected: "Document | None" = None
    desirable: bool | None = None

    def differing(self, other: "Document") -> "Document":
        """The other document from where it leaves this one, with the whole of the learnt stretch that it lies in."""
        length = min(len(self.ids), len(other.ids))
        start = next((at for at in range(length) if self.ids[at] != other.ids[at]), length)
        while start and other.learnt[start - 1]:
            start -= 1
        return Document(other.row, other.ids[start:], other.learnt[start:])


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
        marks = row.get("desirable", -1)
        other = row.get("rejected_input_ids")
        start = 0
        for length, number in zip(row["seq_lengths"], row["rows"], strict=True):
            end = start + length
            yield Document(
                number,
                row["input_ids"][start:end],
                _learnt(row["labels"][start:end]),
                rejected=Document(number, other, _learnt(row["rejected_labels"])) if other else None,
                desirable=bool(marks) if marks >= 0 else None,
            )
            start = end

    def at(self, pack: int, position: int) -> Document:
        """The document that begins at a position of a packed row."""
        start = 0
        for document in self.documents(pack):
            if start == position:
                return document
            start += len(document.ids)
        raise AssertionError(f"the ledger names position {position} of row {pack}, where no document begins")

    def sample(self, wanted: int) -> list[Document]:
        """Documents drawn evenly, always the same; the first ones of packed rows alone would be the longest."""
        ends = np.cumsum(pyarrow.compute.list_value_length(self.table["seq_lengths"]).to_numpy())
        total = int(ends[-1]) if len(ends) else 0
        chosen: Any = (
            np.sort(np.random.default_rng(0).choice(total, min(wanted, total), replace=False)) if total else []
        )
        packs = np.searchsorted(ends, chosen, side="right")
        before = np.concatenate([[0], ends])
        return [
            list(self.documents(int(pack)))[int(number - before[pack])]
            for number, pack in zip(chosen, packs, strict=True)
        ]


def _learnt(labels: list[int]) -> list[bool]:
    return [label != IGNORED for label in labels]


def runs(document: Document, tokenizer: Any, *, apart: int | None = None) -> list[tuple[str, bool]]:
    """Text in stretches with whether each is learnt; a character split over tokens stays whole within a stretch.

    Args:
        apart: A token that gets stretches of its own.
    """
    stretches: list[tuple[list[int], bool]] = []
    alone = False
    for token, learnt in zip(document.ids, document.learnt, strict=True):
        if not stretches or stretches[-1][1] != learnt or alone or token == apart:
            stretches.append(([], learnt))
        stretches[-1][0].append(token)
        alone = token == apart
    return [(tokenizer.decode(ids, skip_special_tokens=False), learnt) for ids, learnt in stretches]
