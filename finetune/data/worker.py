"""What one process does with a batch of rows: read, render, tokenise, mark, measure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.data.checks.shingles import signatures
from finetune.data.conversation import BadRow, Conversation, check
from finetune.data.files import Raw
from finetune.data.formats import READERS
from finetune.data.formats.fields import tests_of
from finetune.data.jsonarray import refuse_constant, unique
from finetune.data.length import fit
from finetune.data.render import Rendered, Renderer
from finetune.data.row_flags import FLAGS, flags_of, hashes_of
from finetune.data.tokens import Encoded, Encoder

ROW = np.dtype(
    [
        ("source", "i2"),
        ("line", "i4"),
        ("reason", "i2"),
        ("flags", "u1"),
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
)  # fmt: skip
DOCUMENT = np.dtype([("row", "i8"), ("length", "i4"), ("trained", "i4"), ("answer", "i4"), ("role", "i1")])
CHOSEN, REJECTED = 0, 1


class TooLong(BadRow):
    """A row that is refused before it is tokenised.

    Args:
        fewest: Tokens that it has at least; the lengths count it so.
    """

    def __init__(self, reason: str, detail: str, *, fewest: int) -> None:
        super().__init__(reason, detail)
        self.fewest = fewest


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process needs; made once.

    Attributes:
        formats: By source: the format's name and the columns to map.
        references: By source: whether the answers' text must be kept for evaluation.
        preference: Whether rejected answers are tokenised too.
    """

    formats: dict[int, tuple[str, dict[str, str]]]
    references: frozenset[int]
    renderer: Renderer
    tokenizer: str
    max_tokens: int
    too_long: str
    preference: bool


@dataclass(slots=True)
class Processed:
    """A batch's outcome, columnar.

    Attributes:
        rows: One ``ROW`` per input row, in order.
        documents: One ``DOCUMENT`` per tokenised document; ``row`` counts from the batch's first row.
        ids: All tokens.
        learnt: 1 where a token carries loss.
        signatures: For finding near duplicates, one per document.
        reasons: Reason texts that ``rows["reason"]`` counts into, from 1.
        details: For bad rows: what exactly was wrong.
        references: Text of the last turns, where asked for.
        tests: What judges them, where a row says.
    """

    rows: np.ndarray
    documents: np.ndarray
    ids: np.ndarray
    learnt: np.ndarray
    signatures: np.ndarray
    reasons: list[str]
    details: dict[int, str] = field(default_factory=dict)
    references: dict[int, str] = field(default_factory=dict)
    tests: dict[int, str] = field(default_factory=dict)


class Worker:
    """Holds what is costly to make: the tokenizer's core."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.encoder = Encoder(job.tokenizer)

    def process(self, source: int, raws: Sequence[Raw]) -> Processed:
        """One batch of one source."""
        batch = _Batch(source, raws)
        name, columns = self.job.formats[source]
        rendered: list[tuple[int, int, Conversation, Rendered]] = []
        for number, (_, value) in enumerate(raws):
            mine: list[tuple[int, int, Conversation, Rendered]] = []
            try:
                conversation = read(value, name, columns)
                check(conversation, self.job.renderer.train_roles)
                mine.append((number, CHOSEN, conversation, self._render(conversation)))
                if conversation.rejected is not None and self.job.preference:
                    other = Conversation([*conversation.messages[:-1], conversation.rejected], tools=conversation.tools)
                    mine.append((number, REJECTED, other, self._render(other)))
                batch.describe(number, conversation, mine[0][-1])
            except BadRow as error:
                batch.refuse(number, _of_rejected(error) if mine else error)
                if isinstance(error, TooLong) and not mine:
                    batch.rows[number]["full_tokens"] = error.fewest
            else:
                rendered += mine
        encoded_items = self.encoder.encode([item for *_, item in rendered])
        for (number, role, conversation, item), encoded in zip(rendered, encoded_items, strict=True):
            try:
                if isinstance(encoded, BadRow):
                    raise encoded
                batch.add(number, role, self._fitted(conversation, encoded, batch, number, role))
                if role == CHOSEN and source in self.job.references:
                    batch.references[number] = item.reference
                    if conversation.tests is not None:
                        batch.tests[number] = tests_of(conversation.tests)
            except BadRow as error:
                if not batch.rows["reason"][number]:
                    batch.refuse(number, _of_rejected(error) if role == REJECTED else error)
        return batch.done()

    def _render(self, conversation: Conversation) -> Rendered:
        rendered = self.job.renderer.render(conversation)
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            raise BadRow("the text holds half a character (a lone surrogate)", f"at character {error.start}") from error
        fewest = self.encoder.fewest_tokens(rendered.text)
        if fewest > self.job.max_tokens and self.job.too_long in ("drop", "error"):
            raise TooLong("longer than max_tokens", f"at least {fewest:,} tokens", fewest=fewest)
        return rendered

    def _fitted(
        self, conversation: Conversation, encoded: Encoded, batch: "_Batch", number: int, role: int
    ) -> list[Encoded]:
        row = batch.rows[number]
        if role == CHOSEN:
            row["full_tokens"], row["full_trained"] = len(encoded.ids), encoded.trained
            row["flags"] |= FLAGS["in pieces"] * encoded.in_pieces
        if len(encoded.ids) <= self.job.max_tokens:
            return [encoded]
        pieces, cut = fit(
            encoded, conversation, max_tokens=self.job.max_tokens, policy=self.job.too_long, again=self._again
        )
        row["truncated_by"] += cut
        return pieces

    def _again(self, conversation: Conversation) -> Encoded:
        result = self.encoder.encode([self._render(conversation)])[0]
        if isinstance(result, BadRow):
            raise result
        return result


def _of_rejected(error: BadRow) -> BadRow:
    return BadRow(f"{error.reason} (the rejected answer)", error.detail)


def read(value: Any, name: str, columns: dict[str, str]) -> Conversation:
    """A raw row as a conversation.

    Raises:
        BadRow: It is not what the format says.
    """
    if isinstance(value, bytes):
        value = _json(value)
    if isinstance(value, tuple):
        raise BadRow("the row has another number of cells than the header", f"{value[0]} instead of {value[1]}")
    if not isinstance(value, dict):
        raise BadRow("the row is not an object", f"it is a {type(value).__name__}")
    if columns:
        absent = [actual for actual in columns.values() if actual not in value]
        if absent:
            raise BadRow(f"column {absent[0]!r} is missing", f"the row has {', '.join(map(str, value))}")
        value = {**value, **{ours: value[actual] for ours, actual in columns.items()}}
    conversation = READERS[name](value)
    conversation.tests = value.get("tests")
    return conversation


def as_object(value: Any) -> dict[str, Any]:
    """A raw row as an object, or an empty one where it is none; for looking at the first rows only."""
    try:
        value = _json(value) if isinstance(value, bytes) else value
    except BadRow:
        return {}
    return value if isinstance(value, dict) else {}


def _json(value: bytes) -> Any:
    try:
        return json.loads(value, object_pairs_hook=unique, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise BadRow("the line is not valid JSON", f"{error.msg}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise BadRow("the line is not UTF-8", f"byte {error.start}: {error.reason}") from error
    except RecursionError as error:
        raise BadRow("the line is not valid JSON", "nested too deeply") from error
    except ValueError as error:
        raise BadRow("the line is not valid JSON", str(error)) from error


class _Batch:
    """Gathers a batch's outcome row by row."""

    def __init__(self, source: int, raws: Sequence[Raw]) -> None:
        self.rows = np.zeros(len(raws), dtype=ROW)
        self.rows["source"] = source
        self.rows["line"] = [line for line, _ in raws]
        self.rows["desirable"] = -1
        self.documents: list[list[tuple[int, int, int, int, int]]] = [[] for _ in raws]
        self.pieces: list[list[Encoded]] = [[] for _ in raws]
        self.reasons: dict[str, int] = {}
        self.details: dict[int, str] = {}
        self.references: dict[int, str] = {}
        self.tests: dict[int, str] = {}

    def refuse(self, number: int, error: BadRow) -> None:
        self.rows["reason"][number] = self.reasons.setdefault(error.reason, len(self.reasons) + 1)
        self.details[number] = error.detail
        self.documents[number], self.pieces[number] = [], []

    def describe(self, number: int, conversation: Conversation, rendered: Rendered) -> None:
        row = self.rows[number]
        row["content"], row["prompt"], row["answer"] = hashes_of(conversation)
        row["characters"] = len(rendered.text)
        if conversation.desirable is not None:
            row["desirable"] = conversation.desirable
        row["flags"] = flags_of(rendered)

    def add(self, number: int, role: int, pieces: list[Encoded]) -> None:
        if self.rows["reason"][number]:
            return
        for encoded in pieces:
            trained = encoded.trained
            if not trained:
                raise BadRow("no trained token is left")
            self.documents[number].append((number, len(encoded.ids), trained, encoded.answer, role))
            self.pieces[number].append(encoded)

    def done(self) -> Processed:
        self.rows["pieces"] = [sum(document[4] == CHOSEN for document in documents) for documents in self.documents]
        pieces = [encoded for row in self.pieces for encoded in row]
        documents = [document for row in self.documents for document in row]
        listed = np.array(documents, dtype=DOCUMENT) if documents else np.zeros(0, dtype=DOCUMENT)
        ids = np.concatenate([np.array(encoded.ids, dtype=np.int32) for encoded in pieces] or [np.zeros(0, np.int32)])
        return Processed(
            rows=self.rows,
            documents=listed,
            ids=ids,
            signatures=signatures(ids, listed["length"].astype(np.int64)),
            learnt=np.concatenate([encoded.mask() for encoded in pieces] or [np.zeros(0, np.uint8)]),
            reasons=list(self.reasons),
            details=self.details,
            references={number: text for number, text in self.references.items() if not self.rows["reason"][number]},
            tests=self.tests,
        )
