"""Stores the tokens of all rows in flat files, so that memory does not grow with them."""

import shutil
from pathlib import Path

import numpy as np

from finetune.data.shingles import SIGNATURE
from finetune.data.worker import DOCUMENT, ROW, Processed
from finetune.inference.rows import IGNORED

TOKEN_DTYPE, MASK_DTYPE = np.dtype(np.int32), np.dtype(np.uint8)


class TokenStore:
    """Tokens, masks and facts of all rows: first appended to batch by batch, then read as memory maps.

    Args:
        folder: Scratch folder; `delete` removes it.

    Attributes:
        reasons: Why rows were rejected; ``rows["reason"]`` indexes it from 1.
        details: Row -> the value that made it unusable.
        references: Row -> text of its last turn, where required.
        tests: Row -> the tests that judge its answer, where it has some.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.reasons: list[str] = []
        self.details: dict[int, str] = {}
        self.references: dict[int, str] = {}
        self.tests: dict[int, str] = {}
        self._chat_places: dict[int, int] = {}
        self.count = 0
        self._rows: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self._signatures: list[np.ndarray] = []
        self._ids = open(folder / "ids", "wb")  # noqa: SIM115 - open for as long as rows come in
        self._mask = open(folder / "mask", "wb")  # noqa: SIM115
        self._chats = open(folder / "chats", "wb+")  # noqa: SIM115 - prompts may be long, so they are not kept in memory

    def add(self, batch: Processed) -> None:
        """Appends one batch."""
        numbers = np.array([0, *[self.reason(text) for text in batch.reasons]], dtype="i2")
        batch.rows["reason"] = numbers[batch.rows["reason"]]
        batch.documents["row"] += self.count
        self.details.update({self.count + number: text for number, text in batch.details.items()})
        for number, (text, chat) in batch.references.items():
            self.references[self.count + number] = text
            self._keep_chat(self.count + number, chat)
        self.tests.update({self.count + number: text for number, text in batch.tests.items()})
        self._rows.append(batch.rows)
        self._documents.append(batch.documents)
        self._signatures.append(batch.signatures)
        batch.ids.tofile(self._ids)
        batch.loss_mask.tofile(self._mask)
        self.count += len(batch.rows)

    def reason(self, text: str) -> int:
        """Returns the number of a reason, which is added if it is new."""
        if text not in self.reasons:
            self.reasons.append(text)
        return self.reasons.index(text) + 1

    def close(self) -> None:
        """Ends writing. After this, rows, documents, tokens and masks can be read."""
        self._ids.close()
        self._mask.close()
        self.rows = np.concatenate(self._rows) if self._rows else np.zeros(0, ROW)
        self.documents = np.concatenate(self._documents) if self._documents else np.zeros(0, DOCUMENT)
        self.signatures = np.concatenate(self._signatures) if self._signatures else np.zeros((0, SIGNATURE), np.uint32)
        self._rows, self._documents, self._signatures = [], [], []
        self.starts = np.concatenate([[0], np.cumsum(self.documents["length"], dtype=np.int64)])
        self.ids = self._map("ids", TOKEN_DTYPE)
        self.mask = self._map("mask", MASK_DTYPE)

    def _keep_chat(self, row: int, chat: str | None) -> None:
        if chat is not None:
            self._chat_places[row] = self._chats.tell()
            self._chats.write(f"{chat}\n".encode())

    def chat(self, row: int) -> str | None:
        """Returns the turns before a row's last one and the tools, as JSON; None for raw text."""
        if row not in self._chat_places:
            return None
        self._chats.seek(self._chat_places[row])
        return self._chats.readline().decode().rstrip("\n")

    def delete(self) -> None:
        """Deletes the files, the folder included."""
        for file in (self._ids, self._mask, self._chats):
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        file = self.folder / name
        return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)

    def tokens(self, documents: np.ndarray) -> np.ndarray:
        """Returns the tokens of documents, one after the other."""
        return np.asarray(self.ids[self._index(documents)], dtype=np.int32)

    def _index(self, documents: np.ndarray) -> np.ndarray:
        lengths = self.documents["length"][documents].astype(np.int64)
        ends = np.cumsum(lengths)
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts[documents] - (ends - lengths), lengths)

    def tokens_and_labels(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens and the labels of documents, one after the other."""
        index = self._index(documents)
        ids = np.asarray(self.ids[index], dtype=np.int32)
        return ids, np.where(self.mask[index] == 1, ids, np.int32(IGNORED)).astype(np.int32)
