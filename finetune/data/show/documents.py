"""Reads documents back from disk as text with the trained spans marked: exactly what training sees."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.compute

from finetune.inference.rows import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a split.

    Attributes:
        row: Its row number in the ledger.
        ids: Token ids.
        trained: Whether each token has loss.
        rejected: The rejected answer with its prompt, for preference objectives.
        desirable: For unpaired preference: whether the answer is a good one.
    """

    row: int
    ids: list[int]
    trained: list[bool]
    rejected: "Document | None" = None
    desirable: bool | None = None

    def differing(self, other: "Document") -> "Document":
        """Returns the other document from the trained span in which it first differs from this one."""
        length = min(len(self.ids), len(other.ids))
        start = next((at for at in range(length) if self.ids[at] != other.ids[at]), length)
        while start and other.trained[start - 1]:
            start -= 1
        return Document(other.row, other.ids[start:], other.trained[start:])


class SplitFile:
    """``train/`` or ``heldout/``, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        source = pyarrow.memory_map(str(folder / "data-00000-of-00001.arrow"))
        self.table = pyarrow.ipc.open_stream(source).read_all()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def documents(self, pack: int) -> Iterator[Document]:
        """Yields the documents of one packed row, in order."""
        row = self.table.slice(pack, 1).to_pylist()[0]
        label = row.get("desirable", -1)
        rejected_ids = row.get("rejected_input_ids")
        start = 0
        for length, number in zip(row["seq_lengths"], row["rows"], strict=True):
            end = start + length
            yield Document(
                number,
                row["input_ids"][start:end],
                _trained(row["labels"][start:end]),
                rejected=Document(number, rejected_ids, _trained(row["rejected_labels"])) if rejected_ids else None,
                desirable=bool(label) if label >= 0 else None,
            )
            start = end

    def at(self, pack: int, position: int) -> Document:
        """Returns the document that begins at a position of a packed row."""
        start = 0
        for document in self.documents(pack):
            if start == position:
                return document
            start += len(document.ids)
        raise AssertionError(f"the ledger names position {position} of row {pack}, where no document begins")

    def sample(self, count: int) -> list[Document]:
        """Draws documents evenly, always the same ones; the first ones of packed rows would all be long."""
        ends = np.cumsum(pyarrow.compute.list_value_length(self.table["seq_lengths"]).to_numpy())
        total = int(ends[-1]) if len(ends) else 0
        if not total:
            return []
        numbers = np.sort(np.random.default_rng(0).choice(total, min(count, total), replace=False))
        packs = np.searchsorted(ends, numbers, side="right")
        positions = numbers - np.concatenate([[0], ends])[packs]
        return [list(self.documents(int(pack)))[at] for pack, at in zip(packs, positions.tolist(), strict=True)]


def _trained(labels: list[int]) -> list[bool]:
    return [label != IGNORED for label in labels]


def decode_spans(
    document: Document, tokenizer: "PreTrainedTokenizerBase", *, separate: int | None = None
) -> list[tuple[str, bool]]:
    """Returns the text in spans, and whether each is trained on. Characters of several tokens stay complete in a span.

    Args:
        separate: A token that gets spans of its own.
    """
    spans: list[tuple[list[int], bool]] = []
    for token, trained in zip(document.ids, document.trained, strict=True):
        if not spans or spans[-1][1] != trained or separate in (token, spans[-1][0][-1]):
            spans.append(([], trained))
        spans[-1][0].append(token)
    return [(str(tokenizer.decode(ids, skip_special_tokens=False)), trained) for ids, trained in spans]
