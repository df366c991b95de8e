"""Text as token ids, in batches, and masks by position."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from finetune.data.conversation import BadRow
from finetune.data.render import Rendered
from finetune.errors import DataError

IGNORED = -100
"""The ignore_index default of torch.nn.CrossEntropyLoss."""


class Encoder:
    """The tokenizer's own Rust core, adding nothing of its own: the text holds every control token already.

    Args:
        serialized: ``tokenizer.backend_tokenizer.to_str()``.
    """

    def __init__(self, serialized: str) -> None:
        from tokenizers import Tokenizer, processors

        self.core = Tokenizer.from_str(serialized)
        self.core.no_truncation()
        self.core.no_padding()
        # The byte-level post-processor may move offsets off the spaces; ours must be exact.
        self.core.post_processor = processors.ByteLevel(trim_offsets=False)
        self.longest_token = max(map(len, self.core.get_vocab()))

    def fewest_tokens(self, text: str) -> int:
        """A text cannot have fewer tokens than this: no token is longer than the vocabulary's longest."""
        return -(-len(text) // self.longest_token)

    @classmethod
    def of(cls, tokenizer: Any) -> "Encoder":
        return cls(serialized(tokenizer))

    def encode(self, rendered: Sequence[Rendered]) -> list["Encoded | BadRow"]:
        """Token ids and masks; a row that cannot be marked exactly becomes a reason instead."""
        batch = self.core.encode_batch([item.text for item in rendered], add_special_tokens=False)
        results: list[Encoded | BadRow] = []
        for item, encoding in zip(rendered, batch, strict=True):
            try:
                results.append(self._marked(item, encoding))
            except BadRow as error:
                results.append(error)
        return results

    def _marked(self, rendered: Rendered, encoding: Any) -> "Encoded":
        borders = [position for span in rendered.spans for position in span]
        if rendered.literals:
            return self._in_pieces(rendered, [*borders, rendered.answer])
        found = [_token_at(encoding, position, len(rendered.text)) for position in borders]
        answer = (
            found[-2]
            if rendered.answer == rendered.spans[-1][0]
            else _token_at(encoding, rendered.answer, len(rendered.text))
        )
        if any(position is None for position in [*found, answer]):
            return self._in_pieces(rendered, [*borders, rendered.answer])
        return Encoded(encoding.ids, list(zip(found[::2], found[1::2], strict=True)), answer)  # type: ignore[arg-type]

    def _in_pieces(self, rendered: Rendered, borders: list[int]) -> "Encoded":
        """Tokenises between the borders, as serving does, where a token would lie across one.

        A prompt that ends in a newline before an answer that begins with one is the usual case: together they are one
        token, which no served prompt ever ends in.
        """
        cuts = sorted({0, *borders, len(rendered.text)})
        ids: list[int] = []
        at = {0: 0}
        for start, end in pairwise(cuts):
            ids += self._piece(rendered.text[start:end], rendered.literals)
            at[end] = len(ids)
        spans = [(at[start], at[end]) for start, end in rendered.spans]
        spelt = (
            "".join(rendered.literals.get(character, character) for character in rendered.text)
            if rendered.literals
            else rendered.text
        )
        if self.core.decode(ids, skip_special_tokens=False) != spelt:
            if rendered.literals:
                raise BadRow(
                    "the tokenizer cannot spell out the control tokens in the text",
                    ", ".join(rendered.literals.values()),
                )
            raise BadRow("a token lies across the border between prompt and answer")
        return Encoded(ids, spans, at[rendered.answer], in_pieces=True)

    def _piece(self, text: str, literals: dict[str, str]) -> list[int]:
        pieces, plain = [], ""
        for character in text:
            if character in literals:
                pieces += [(plain, False), (literals[character], True)]
                plain = ""
            else:
                plain += character
        ids: list[int] = []
        for piece, literal in [*pieces, (plain, False)]:
            self.core.encode_special_tokens = literal
            ids += self.core.encode(piece, add_special_tokens=False).ids
        self.core.encode_special_tokens = False
        return ids


class Encoded:
    """One document.

    Attributes:
        ids: Token ids.
        spans: Learnt stretches, [start, end) in tokens.
        answer: First token of the last turn.
        in_pieces: Tokenised in pieces, because a token would have crossed a border.
    """

    __slots__ = ("answer", "ids", "in_pieces", "spans")

    def __init__(self, ids: list[int], spans: list[tuple[int, int]], answer: int, *, in_pieces: bool = False) -> None:
        self.ids = ids
        self.spans = spans
        self.answer = answer
        self.in_pieces = in_pieces

    @property
    def trained(self) -> int:
        """Number of tokens that carry loss."""
        return sum(end - max(start, 1) for start, end in self.spans if end > 1)

    def mask(self) -> np.ndarray:
        """1 where a token carries loss. The first token never does: nothing stands before it that could predict it."""
        learnt = np.zeros(len(self.ids), dtype=np.uint8)
        for start, end in self.spans:
            learnt[start:end] = 1
        learnt[:1] = 0
        return learnt


def _token_at(encoding: Any, position: int, length: int) -> int | None:
    """The token that begins at a character, or None where a token lies across it.

    Halving the tokens is ten times faster than the library's ``char_to_token``, which walks them all.
    """
    count = len(encoding)
    if position == length:
        return count
    token = bisect_left(range(count), position, key=lambda number: encoding.token_to_chars(number)[0])
    if token == count or encoding.token_to_chars(token)[0] != position:
        return None
    return token


def serialized(tokenizer: Any) -> str:
    """The fast tokenizer's whole content, which also identifies it.

    Raises:
        DataError: The tokenizer is a slow one.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise DataError(
            f"{type(tokenizer).__name__} is no fast tokenizer, so positions in the text are unknown; use the model's tokenizer.json"
        )
    return str(core.to_str())
