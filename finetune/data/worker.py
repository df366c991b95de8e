"""Processes a batch of rows in one process: reads, renders, tokenizes and masks them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.data.apart import encode_apart, must_be_apart
from finetune.data.conversation import BadRow, Conversation, chat_before, check
from finetune.data.encoder import Encoded, Encoder
from finetune.data.files import Raw
from finetune.data.formats import READERS
from finetune.data.formats.fields import read_tests, with_own_names
from finetune.data.json_array import reject_constant, reject_duplicate_keys
from finetune.data.render import Rendered, Renderer
from finetune.data.row_flags import FLAGS, find_flags, hash_conversation
from finetune.data.shingles import signatures
from finetune.data.truncation import shorten

ROW = np.dtype(
    [
        ("source", "i2"),
        ("line", "i4"),
        ("reason", "i2"),
        ("flags", "u2"),
        ("pieces", "i4"),
        ("full_tokens", "i4"),
        ("full_trained", "i4"),
        ("truncated_by", "i4"),
        ("content", "u8"),
        ("prompt", "u8"),
        ("answer", "u8"),
        ("desirable", "i1"),
        ("characters", "i4"),
    ]
)
DOCUMENT = np.dtype([("row", "i8"), ("length", "i4"), ("trained", "i4"), ("answer", "i4"), ("role", "i1")])
CHOSEN, REJECTED = 0, 1


class TooLong(BadRow):
    """A row that is rejected before it is tokenized.

    Args:
        min_tokens: Lower bound of its tokens, for the length statistics.
    """

    def __init__(self, *, min_tokens: int) -> None:
        super().__init__("longer than max_tokens", f"at least {min_tokens:,} tokens")
        self.min_tokens = min_tokens


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings that every worker process needs.

    Attributes:
        formats: Source number -> name of the format, and the columns to map.
        references: Numbers of the sources whose answers are kept as text, for the evaluation.
        tokenizer: Its serialized content.
        compares: Whether answers are compared: rejected ones are also tokenized, and a row is its last turn.
    """

    formats: dict[int, tuple[str, dict[str, str]]]
    references: frozenset[int]
    renderer: Renderer
    tokenizer: str
    max_tokens: int
    too_long: str
    compares: bool


@dataclass(slots=True)
class Processed:
    """The result of one batch, in columns.

    Attributes:
        rows: One ``ROW`` per input row, in order.
        documents: One ``DOCUMENT`` per tokenized document; ``row`` counts from the batch's first row.
        ids: All tokens.
        loss_mask: 1 for tokens with loss.
        signatures: MinHash signature of each document.
        reasons: Texts that ``rows["reason"]`` indexes, from 1.
        details: Row -> the value that made it unusable.
        references: Row -> text of its last turn, and the chat before it (see `chat_before`), where required.
        tests: Row -> the tests that judge its answer, where it has some.
    """

    rows: np.ndarray
    documents: np.ndarray
    ids: np.ndarray
    loss_mask: np.ndarray
    signatures: np.ndarray
    reasons: list[str]
    details: dict[int, str] = field(default_factory=dict)
    references: dict[int, tuple[str, str | None]] = field(default_factory=dict)
    tests: dict[int, str] = field(default_factory=dict)


class Worker:
    """Processes batches with one tokenizer, which is slow to load."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.encoder = Encoder(settings.tokenizer)

    def process(self, source: int, raws: Sequence[Raw]) -> Processed:
        """Processes one batch of one source."""
        batch = _Batch(source, raws)
        name, columns = self.settings.formats[source]
        rendered: list[tuple[int, int, Rendered]] = []
        for number, (_, value) in enumerate(raws):
            of_row: list[tuple[int, int, Rendered]] = []
            try:
                conversation = read(value, name, columns)
                check(conversation, self.settings.renderer.train_roles)
                texts = self._render(conversation)
                of_row += [(number, CHOSEN, text) for text in texts]
                if conversation.rejected is not None and self.settings.compares:
                    other = Conversation([*conversation.messages[:-1], conversation.rejected], tools=conversation.tools)
                    of_row.append((number, REJECTED, self._render(other)[0]))
                batch.describe(number, conversation, characters=len(texts[0].text))
            except BadRow as error:
                batch.refuse(number, _of_rejected(error) if of_row else error)
                if isinstance(error, TooLong) and not of_row:
                    batch.rows[number]["full_tokens"] = error.min_tokens
            else:
                rendered += of_row
        results = self.encoder.encode([item for *_, item in rendered])
        for (number, role, item), encoded in zip(rendered, results, strict=True):
            try:
                for text, result in self._apart(item, encoded):
                    if isinstance(result, BadRow):
                        raise result
                    batch.rows[number]["flags"] |= find_flags(text)
                    batch.add(number, role, self._pieces(text, result, batch.rows[number], role))
                first = number not in batch.references
                if role == CHOSEN and source in self.settings.references and first:
                    chat = chat_before(item.conversation, system=self.settings.renderer.system)
                    batch.references[number] = item.reference, chat
                    if item.conversation.tests is not None:
                        batch.tests[number] = read_tests(item.conversation.tests)
            except BadRow as error:
                if not batch.rows["reason"][number]:
                    batch.refuse(number, _of_rejected(error) if role == REJECTED else error)
        return batch.done()

    def _render(self, conversation: Conversation) -> list[Rendered]:
        """Renders a conversation; for preference objectives only the row of its last turn, which the answers share."""
        texts = self.settings.renderer.render(conversation)
        if self.settings.compares:
            del texts[1:]
        for rendered in texts:
            try:
                rendered.text.encode()
            except UnicodeEncodeError as error:
                raise BadRow(
                    "the text contains half a character (a lone surrogate)", f"at character {error.start}"
                ) from error
            min_tokens = self.encoder.min_tokens(rendered.text)
            if min_tokens > self.settings.max_tokens and self.settings.too_long in ("drop", "error"):
                raise TooLong(min_tokens=min_tokens)
        return texts

    def _apart(self, rendered: Rendered, encoded: Encoded | BadRow) -> list[tuple[Rendered, Encoded | BadRow]]:
        """Returns the text, or one text for each of its turns where one row cannot hold them."""
        if self.settings.compares or isinstance(encoded, BadRow) or not must_be_apart(rendered, encoded):
            return [(rendered, encoded)]
        return encode_apart(rendered, self.settings.renderer, self.encoder)

    def _pieces(self, rendered: Rendered, encoded: Encoded, row: np.void, role: int) -> list[Encoded]:
        if role == CHOSEN:
            row["full_tokens"] = max(row["full_tokens"], len(encoded.ids))
            row["full_trained"] += encoded.trained_tokens
            row["flags"] |= FLAGS["in pieces"] * encoded.in_pieces
        limit, policy = self.settings.max_tokens, self.settings.too_long
        if len(encoded.ids) <= limit:
            return [encoded]
        pieces, lost = shorten(encoded, rendered.conversation, max_tokens=limit, policy=policy, encode=self._encode)
        row["truncated_by"] += lost
        return pieces

    def _encode(self, conversation: Conversation) -> Encoded:
        """Renders and tokenizes a shortened conversation, whose trained turns are in one text."""
        texts = self._render(conversation)
        if len(texts) > 1:
            raise BadRow("longer than max_tokens, and the chat template rewrites its turns", f"{len(texts)} texts")
        result = self.encoder.encode(texts)[0]
        if isinstance(result, BadRow):
            raise result
        return result


def _of_rejected(error: BadRow) -> BadRow:
    return BadRow(f"{error.reason} (the rejected answer)", error.detail)


def read(value: Any, name: str, columns: dict[str, str]) -> Conversation:
    """Reads a raw row as a conversation.

    Raises:
        BadRow: It does not have the format.
    """
    if isinstance(value, bytes):
        value = _json(value)
    if isinstance(value, tuple):
        raise BadRow("the row and the header have different numbers of cells", f"{value[0]} and {value[1]}")
    if not isinstance(value, dict):
        raise BadRow("the row is not an object", f"it is a {type(value).__name__}")
    if columns:
        missing = [actual for actual in columns.values() if actual not in value]
        if missing:
            raise BadRow(f"column {missing[0]!r} is missing", f"the row has {', '.join(map(str, value))}")
        value = {**value, **{column: value[actual] for column, actual in columns.items()}}
    try:
        conversation = READERS[name](value)
    except BadRow as error:
        raise BadRow(with_own_names(error.reason, columns), error.detail) from error
    conversation.tests = value.get("tests")
    return conversation


def parse_object(value: Any) -> dict[str, Any]:
    """Reads a raw row as an object; returns {} where it is not one. For format detection only."""
    try:
        value = _json(value) if isinstance(value, bytes) else value
    except BadRow:
        return {}
    return value if isinstance(value, dict) else {}


def _json(value: bytes) -> Any:
    try:
        return json.loads(value, object_pairs_hook=reject_duplicate_keys, parse_constant=reject_constant)
    except json.JSONDecodeError as error:
        raise BadRow("the line is not valid JSON", f"{error.msg}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise BadRow("the line is not UTF-8", f"byte {error.start}: {error.reason}") from error
    except RecursionError as error:
        raise BadRow("the line is not valid JSON", "nested too deeply") from error
    except ValueError as error:
        raise BadRow("the line is not valid JSON", str(error)) from error


class _Batch:
    """Collects the result of a batch row by row."""

    def __init__(self, source: int, raws: Sequence[Raw]) -> None:
        self.rows = np.zeros(len(raws), dtype=ROW)
        self.rows["source"] = source
        self.rows["line"] = [line for line, _ in raws]
        self.rows["desirable"] = -1
        self.documents: list[list[tuple[int, int, int, int, int]]] = [[] for _ in raws]
        self.pieces: list[list[Encoded]] = [[] for _ in raws]
        self.reasons: dict[str, int] = {}
        self.details: dict[int, str] = {}
        self.references: dict[int, tuple[str, str | None]] = {}
        self.tests: dict[int, str] = {}

    def refuse(self, number: int, error: BadRow) -> None:
        self.rows["reason"][number] = self.reasons.setdefault(error.reason, len(self.reasons) + 1)
        self.details[number] = error.detail
        self.documents[number], self.pieces[number] = [], []

    def describe(self, number: int, conversation: Conversation, *, characters: int) -> None:
        row = self.rows[number]
        row["content"], row["prompt"], row["answer"] = hash_conversation(conversation)
        row["characters"] = characters
        if conversation.desirable is not None:
            row["desirable"] = conversation.desirable

    def add(self, number: int, role: int, pieces: list[Encoded]) -> None:
        if self.rows["reason"][number]:
            return
        for encoded in pieces:
            if not encoded.trained_tokens:
                raise BadRow("no trained token is left")
            self.documents[number].append((number, len(encoded.ids), encoded.trained_tokens, encoded.answer, role))
            self.pieces[number].append(encoded)

    def done(self) -> Processed:
        self.rows["pieces"] = [sum(document[4] == CHOSEN for document in documents) for documents in self.documents]
        pieces = [encoded for row in self.pieces for encoded in row]
        documents = [document for row in self.documents for document in row]
        columns = np.array(documents, dtype=DOCUMENT) if documents else np.zeros(0, dtype=DOCUMENT)
        ids = np.concatenate([np.array(encoded.ids, dtype=np.int32) for encoded in pieces] or [np.zeros(0, np.int32)])
        return Processed(
            rows=self.rows,
            documents=columns,
            ids=ids,
            signatures=signatures(ids, columns["length"].astype(np.int64)),
            loss_mask=np.concatenate([encoded.loss_mask() for encoded in pieces] or [np.zeros(0, np.uint8)]),
            reasons=list(self.reasons),
            details=self.details,
            references={number: text for number, text in self.references.items() if not self.rows["reason"][number]},
            tests=self.tests,
        )
