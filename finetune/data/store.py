"""Stores tokens, masks, facts and texts of all rows in files, so that memory does not grow with them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from finetune.data.scratch import Scratch, database
from finetune.data.shingles import SIGNATURE
from finetune.data.worker import DOCUMENT, REJECTED, ROW, Processed
from finetune.inference.rows import IGNORED

GATHERED_DOCUMENTS = 500
"""Documents that are far from each other may map 64 KiB each."""

TABLES = (
    "CREATE TABLE details (row INTEGER PRIMARY KEY, text TEXT)",
    "CREATE TABLE answers (row INTEGER PRIMARY KEY, reference TEXT, chat TEXT, tests TEXT)",
)


class TokenStore(Scratch):
    """Tokens, masks and facts of all rows: first appended to batch by batch, then read from files.

    Args:
        folder: Scratch folder; `delete` removes it.

    Attributes:
        reasons: Why rows were rejected; ``rows["reason"]`` indexes it from 1.
        has_tests: Whether a row has tests that judge its answer.
        rows: One ``ROW`` for each input row.
        documents: One ``DOCUMENT`` for each tokenized document, in the order of the rows.
        signatures: MinHash signature of each document.
        starts: Where the tokens of each document begin in ``ids`` and ``mask``; one more entry than documents.
        first_documents: Number of each row's first document; one more entry than rows.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reasons: list[str] = []
        self.has_tests = False
        self.count = self._document_count = self._token_count = 0
        self._opened = ExitStack()
        names = ("ids", "mask", "rows", "documents", "signatures", "starts", "first_documents")
        self._files = {name: self._opened.enter_context((folder / name).open("wb")) for name in names}
        self._texts = self._opened.enter_context(database(folder / "texts"))
        for table in TABLES:
            self._texts.execute(table)
        for name in ("starts", "first_documents"):
            np.zeros(1, np.int64).tofile(self._files[name])

    def add(self, batch: Processed) -> None:
        """Appends one batch."""
        numbers = np.array([0, *[self.reason(text) for text in batch.reasons]], dtype="i2")
        batch.rows["reason"] = numbers[batch.rows["reason"]]
        self._add_texts(batch)
        of_row = np.bincount(batch.documents["row"], minlength=len(batch.rows))
        batch.documents["row"] += self.count
        columns: dict[str, np.ndarray] = {
            "ids": np.asarray(batch.ids, np.int32),
            "mask": np.asarray(batch.loss_mask, np.uint8),
            "rows": batch.rows,
            "documents": batch.documents,
            "signatures": batch.signatures,
            "starts": self._token_count + np.cumsum(batch.documents["length"], dtype=np.int64),
            "first_documents": self._document_count + np.cumsum(of_row, dtype=np.int64),
        }
        for name, column in columns.items():
            column.tofile(self._files[name])
        self.count += len(batch.rows)
        self._document_count += len(batch.documents)
        self._token_count += len(batch.ids)

    def _add_texts(self, batch: Processed) -> None:
        details = ((self.count + number, text) for number, text in batch.details.items())
        self._texts.executemany("INSERT INTO details VALUES (?, ?)", details)
        answers = (
            (self.count + number, reference, chat, batch.tests.get(number))
            for number, (reference, chat) in batch.references.items()
        )
        self._texts.executemany("INSERT INTO answers VALUES (?, ?, ?, ?)", answers)
        self.has_tests = self.has_tests or bool(batch.tests)

    def reason(self, text: str) -> int:
        """Returns the number of a reason, which is added if it is new."""
        if text not in self.reasons:
            self.reasons.append(text)
        return self.reasons.index(text) + 1

    def close(self) -> None:
        """Ends writing. After this, all columns can be read."""
        for file in self._files.values():
            file.close()
        self.ids = self.map(self.folder / "ids", np.int32)
        self.mask = self.map(self.folder / "mask", np.uint8)
        self.rows = self.map(self.folder / "rows", ROW)
        self.documents = self.map(self.folder / "documents", DOCUMENT)
        self.signatures = self.map(self.folder / "signatures", np.uint32, columns=SIGNATURE)
        self.starts = self.map(self.folder / "starts", np.int64)
        self.first_documents = self.map(self.folder / "first_documents", np.int64)

    def delete(self) -> None:
        """Deletes the files, the folder included."""
        self._opened.close()
        super().delete()

    def answer(self, row: int) -> tuple[str, str | None, str | None]:
        """Returns the text of a row's last turn, the chat before it as JSON, and the tests that judge its answer.

        The chat is None for raw text; the tests are None where it has none.
        """
        query = "SELECT reference, chat, tests FROM answers WHERE row = ?"
        reference, chat, tests = self._texts.execute(query, (row,)).fetchone()
        return reference, chat, tests

    def details(self, start: int, end: int) -> dict[int, str]:
        """Returns the values that made rows from ``start`` to before ``end`` unusable, by row."""
        query = "SELECT row, text FROM details WHERE row >= ? AND row < ?"
        return dict(self._texts.execute(query, (start, end)))

    def count_reasons(self) -> np.ndarray:
        """Counts the rows of each reason; entry 0 counts those without one."""
        size = len(self.reasons) + 1
        counts = np.zeros(size, np.int64)
        for part in self.row_slices():
            counts += np.bincount(self.rows["reason"][part], minlength=size)
        return counts

    def row_slices(self) -> Iterator[slice]:
        """Yields slices of the rows."""
        return self.slices(len(self.rows))

    def document_slices(self) -> Iterator[slice]:
        """Yields slices of the documents."""
        return self.slices(len(self.documents))

    def documents_of(self, rows: slice) -> slice:
        """Returns the slice of the documents of rows."""
        return slice(int(self.first_documents[rows.start]), int(self.first_documents[rows.stop]))

    def rejected(self, rows: np.ndarray) -> np.ndarray:
        """Returns the document of each row's rejected answer, -1 where it has none. A row's rejected answer is last."""
        last = self.first_documents[rows + 1] - 1
        has = (last >= self.first_documents[rows]) & (self.documents["role"][last] == REJECTED)
        return np.where(has, last, -1)

    def tokens(self, documents: np.ndarray) -> np.ndarray:
        """Returns the tokens of documents, one after the other."""
        return self._gather(self.ids, documents)

    def tokens_and_labels(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens and the labels of documents, one after the other."""
        ids = self.tokens(documents)
        return ids, np.where(self._gather(self.mask, documents) == 1, ids, np.int32(IGNORED)).astype(np.int32)

    def _gather(self, column: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Returns the values of documents, one after the other."""
        parts = [np.zeros(0, column.dtype)]
        for part in self.slices(len(documents), GATHERED_DOCUMENTS):
            lengths = self.documents["length"][documents[part]].astype(np.int64)
            ends = np.cumsum(lengths)
            index = np.arange(ends[-1]) + np.repeat(self.starts[documents[part]] - (ends - lengths), lengths)
            parts.append(np.asarray(column[index]))
        return np.concatenate(parts)
