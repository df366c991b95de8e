"""From token ids to text, one token at a time, and the strings that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What a tokenizer writes for bytes that are not a whole character yet."""


class TextDecoder:
    """Decodes an answer token by token; the pieces together are the text of all tokens.

    Decodes each token together with those before it back to the last piece: tokenizers write a leading space, and bytes
    of one character, depending on what comes before.

    Args:
        tokenizer: Decodes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokens: list[int] = []
        self._context = self._done = 0

    def add(self, token: int) -> str:
        """Returns the text that the token completes; empty while a character is incomplete."""
        self.tokens.append(token)
        before, text = self._decode(self._context, self._done), self._decode(self._context, len(self.tokens))
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return ""
        self._context, self._done = self._done, len(self.tokens)
        return text[len(before) :]

    def flush(self) -> str:
        """Returns what is left at the end: bytes that never became a character."""
        before, text = self._decode(self._context, self._done), self._decode(self._context, len(self.tokens))
        self._context = self._done = len(self.tokens)
        return text[len(before) :]

    def _decode(self, first: int, last: int) -> str:
        return str(self._tokenizer.decode(self.tokens[first:last], skip_special_tokens=True))


class StopStrings:
    """Finds the strings that end an answer; holds back text that may be the beginning of one.

    Args:
        stops: The strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [*stops]
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Returns the text that can be sent now: up to the first stop string, and without the possible start of one."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns the text that was held back, at the end of an answer."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of the text are the beginning of the stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
