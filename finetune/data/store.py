"""Tokens of all rows in flat files, so that memory does not grow with them."""

from pathlib import Path

import numpy as np

from finetune.data.checks.shingles import SIGNATURE
from finetune.data.worker import DOCUMENT, ROW, Processed

IDS, LEARNT = np.dtype(np.int32), np.dtype(np.uint8)


class Store:
    """Appended to batch by batch, then read as memory maps.

    Args:
        folder: Scratch; deleted by the caller.

    Attributes:
        reasons: Why rows were refused; ``rows["reason"]`` counts into it from 1.
        details: By row: what exactly was wrong.
        references: By row: the last turn's text, where asked for.
        tests: By row: what judges it, where the row says.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.reasons: list[str] = []
        self.details: dict[int, str] = {}
        self.references: dict[int, str] = {}
        self.tests: dict[int, str] = {}
        self.count = 0
        self._rows: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self._signatures: list[np.ndarray] = []
        self._ids = open(folder / "ids", "wb")  # noqa: SIM115 - open for as long as rows come in
        self._learnt = open(folder / "learnt", "wb")  # noqa: SIM115

    def add(self, batch: Processed) -> None:
        renumbered = np.array([0, *[self.reason(text) for text in batch.reasons]], dtype="i2")
        batch.rows["reason"] = renumbered[batch.rows["reason"]]
        batch.documents["row"] += self.count
        self.details.update({self.count + number: text for number, text in batch.details.items()})
        self.references.update({self.count + number: text for number, text in batch.references.items()})
        self.tests.update({self.count + number: text for number, text in batch.tests.items()})
        self._rows.append(batch.rows)
        self._documents.append(batch.documents)
        self._signatures.append(batch.signatures)
        batch.ids.tofile(self._ids)
        batch.learnt.tofile(self._learnt)
        self.count += len(batch.rows)

    def reason(self, text: str) -> int:
        """The number of a reason, new or known."""
        if text not in self.reasons:
            self.reasons.append(text)
        return self.reasons.index(text) + 1

    def close(self) -> None:
        """Ends the writing. Afterwards rows, documents, tokens and masks can be read."""
        self._ids.close()
        self._learnt.close()
        self.rows = np.concatenate(self._rows) if self._rows else np.zeros(0, ROW)
        self.documents = np.concatenate(self._documents) if self._documents else np.zeros(0, DOCUMENT)
        self.signatures = np.concatenate(self._signatures) if self._signatures else np.zeros((0, SIGNATURE), np.uint32)
        self._rows, self._documents, self._signatures = [], [], []
        self.starts = np.concatenate([[0], np.cumsum(self.documents["length"], dtype=np.int64)])
        self.ids = self._map("ids", IDS)
        self.learnt = self._map("learnt", LEARNT)

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        file = self.folder / name
        return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)

    def tokens(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of some documents, one after the other."""
        return np.asarray(self.ids[self._index(documents)], dtype=np.int32)

    def _index(self, documents: np.ndarray) -> np.ndarray:
        lengths = self.documents["length"][documents].astype(np.int64)
        ends = np.cumsum(lengths)
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts[documents] - (ends - lengths), lengths)

    def gather(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of some documents, one after the other."""
        index = self._index(documents)
        ids = np.asarray(self.ids[index], dtype=np.int32)
        return ids, np.where(self.learnt[index] == 1, ids, np.int32(-100)).astype(np.int32)
