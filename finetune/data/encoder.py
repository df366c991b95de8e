"""Tokenizes rendered text in batches and computes loss masks by position."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.conversation import BadRow
from finetune.data.render import Rendered
from finetune.errors import DataError
from finetune.readable import refusing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONGEST_KEPT, MOST_KEPT = 40, 1000
"""Ends of prompts of up to so many characters repeat in all rows, so the tokens of some are kept."""


class Encoder:
    """The tokenizer's Rust core without any additions: the text already contains every control token.

    Args:
        serialize: ``tokenizer.backend_tokenizer.to_str()``.
    """

    def __init__(self, serialize: str) -> None:
        from tokenizers import Tokenizer, processors

        self.core = Tokenizer.from_str(serialize)
        self.core.no_truncation()
        self.core.no_padding()
        # By default the byte-level post-processor excludes spaces from the offsets; masks need exact offsets.
        self.core.post_processor = processors.ByteLevel(trim_offsets=False)
        self.longest_token = max(map(len, self.core.get_vocab()))
        self.added = frozenset(self.core.get_added_tokens_decoder())
        self.looks_ahead = _looks_ahead(self.core.pre_tokenizer)
        self.prompt_ends: dict[str, list[int]] = {}

    def min_tokens(self, text: str) -> int:
        """Returns a lower bound of the text's tokens: no token is longer than the vocabulary's longest."""
        return -(-len(text) // self.longest_token)

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
        """Builds the encoder of a fast tokenizer."""
        return cls(serialize(tokenizer))

    def encode(self, rendered: Sequence[Rendered]) -> list["Encoded | BadRow"]:
        """Returns the token ids and trained spans of each text, or the reason why it has no exact mask.

        Raises:
            ModelError: The tokenizer fails on a text, e.g. because its pattern tries too many ways to split it.
        """
        with refusing("the tokenizer fails on a row", "correct the patterns in its tokenizer.json"):
            batch = self.core.encode_batch([item.text for item in rendered], add_special_tokens=False)
        results: list[Encoded | BadRow] = []
        for item, encoding in zip(rendered, batch, strict=True):
            try:
                results.append(self._encoded(item, encoding))
            except BadRow as error:
                results.append(error)
        return results

    def _encoded(self, rendered: Rendered, encoding: Any) -> "Encoded":
        borders = [*(position for span in rendered.spans for position in span), rendered.answer]
        if rendered.literals:
            return self._encode_pieces(rendered, borders)
        tokens = [
            token for position in borders if (token := _token_at(encoding, position, len(rendered.text))) is not None
        ]
        if len(tokens) < len(borders):
            return self._encode_pieces(rendered, borders)
        *starts_and_ends, answer = tokens
        ids, starts = encoding.ids, starts_and_ends[::2]
        if self.looks_ahead:
            prompts = {rendered.answer: answer, **dict(zip(borders[:-1:2], starts, strict=True))}
            for position, token in prompts.items():
                if token and not self._is_served(rendered.text, position, encoding, ids, token):
                    return self._encode_pieces(rendered, borders)
        return Encoded(ids, list(zip(starts, starts_and_ends[1::2], strict=True)), answer)

    def _is_served(self, text: str, position: int, encoding: Any, ids: list[int], token: int) -> bool:
        """Returns whether the text before a border alone has the same tokens, as serving tokenizes it.

        A tokenizer may look ahead: GPT-2's splits two newlines before a word, and joins them at the end. Tokens before
        the last word or the last added token cannot differ, since the tokenizer splits the text there first.

        Args:
            ids: All tokens.
            token: Number of the first token after the border.
        """
        first, start = token, position
        while first and not (first < token and _begins_word(text, start)):
            first -= 1
            start = encoding.token_to_chars(first)[0]
            if ids[first] in self.added:
                break
        piece = text[start:position]
        tokens = self.prompt_ends.get(piece)
        if tokens is None:
            tokens = self.core.encode(piece, add_special_tokens=False).ids
            if len(piece) <= LONGEST_KEPT and len(self.prompt_ends) < MOST_KEPT:
                self.prompt_ends[piece] = tokens
        return tokens == ids[first:token]

    def _encode_pieces(self, rendered: Rendered, borders: list[int]) -> "Encoded":
        """Tokenizes the text between the borders piece by piece, as serving does.

        This is for texts where one token would cross a border. The usual case is a prompt that ends in a newline before
        an answer that begins with one: together they are one token, which a served prompt never ends with.
        """
        cuts = sorted({0, *borders, len(rendered.text)})
        ids: list[int] = []
        token_at = {0: 0}
        for start, end in pairwise(cuts):
            ids += self._encode_piece(rendered.text[start:end], rendered.literals)
            token_at[end] = len(ids)
        spans = [(token_at[start], token_at[end]) for start, end in rendered.spans]
        if self.core.decode(ids, skip_special_tokens=False) != rendered.with_literals():
            if rendered.literals:
                tokens = ", ".join(rendered.literals.values())
                raise BadRow("the tokenizer cannot write the control tokens in the text as plain text", tokens)
            raise BadRow("a token crosses the border between prompt and answer")
        return Encoded(ids, spans, token_at[rendered.answer], in_pieces=True)

    def _encode_piece(self, text: str, literals: dict[str, str]) -> list[int]:
        pieces, normal = [], ""
        for character in text:
            if character in literals:
                pieces += [(normal, False), (literals[character], True)]
                normal = ""
            else:
                normal += character
        ids: list[int] = []
        for piece, literal in [*pieces, (normal, False)]:
            self.core.encode_special_tokens = literal
            ids += self.core.encode(piece, add_special_tokens=False).ids
        self.core.encode_special_tokens = False
        return ids


class Encoded:
    """One tokenized document.

    Attributes:
        ids: Token ids.
        spans: Trained spans, [start, end) in tokens.
        answer: First token of the last turn.
        in_pieces: Whether it was tokenized in pieces, because a token would have crossed a border.
    """

    __slots__ = ("answer", "ids", "in_pieces", "spans")

    def __init__(self, ids: list[int], spans: list[tuple[int, int]], answer: int, *, in_pieces: bool = False) -> None:
        self.ids = ids
        self.spans = spans
        self.answer = answer
        self.in_pieces = in_pieces

    @property
    def trained_tokens(self) -> int:
        """Number of tokens with loss."""
        return sum(end - max(start, 1) for start, end in self.spans if end > 1)

    def loss_mask(self) -> np.ndarray:
        """Returns 1 for tokens with loss, else 0. The first token has no loss: there is no token to predict it from."""
        mask = np.zeros(len(self.ids), dtype=np.uint8)
        for start, end in self.spans:
            mask[start:end] = 1
        mask[:1] = 0
        return mask


def _looks_ahead(pre_tokenizer: Any) -> bool:
    """Returns whether the way that text is split before a border may depend on the text after it.

    Without splitting, as in SentencePiece's BPE, it cannot: tokens that end at a border have been merged without it.
    """
    settings: str = pre_tokenizer.__getstate__().decode() if pre_tokenizer is not None else ""
    return "(?" in settings or '"use_regex":true' in settings


def _begins_word(text: str, start: int) -> bool:
    """Whether a token that begins here begins a word with a space, where every tokenizer that looks ahead splits."""
    return text[start] == " " and not text[start + 1 : start + 2].isspace()


def _token_at(encoding: Any, position: int, length: int) -> int | None:
    """Returns the token that begins at a character, or None where a token contains it.

    Bisection is ten times faster than the library's ``char_to_token``, which visits all tokens.
    """
    count = len(encoding)
    if position == length:
        return count
    token = bisect_left(range(count), position, key=lambda number: encoding.token_to_chars(number)[0])
    if token == count or encoding.token_to_chars(token)[0] != position:
        return None
    return token


def serialize(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the complete content of a fast tokenizer, which also identifies it.

    Raises:
        DataError: The tokenizer is not a fast one.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise DataError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so token positions in the text are unknown; "
            "use the model's tokenizer.json"
        )
    return str(core.to_str())
