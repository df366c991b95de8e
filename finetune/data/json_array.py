"""Reads a JSON array element by element, so that the file need not fit into memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from finetune.errors import DataError

BLOCK_CHARACTERS = 1 << 20
SPACE = " \t\r\n"


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object from its pairs and raises ValueError for a repeated key, of which JSON keeps the last value."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} appears twice in one object")
    return value


def reject_constant(name: str) -> None:
    """Raises ValueError for NaN and infinities, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is not a JSON value")


class ArrayReader:
    """Reader that keeps one element and one block of text in memory.

    Args:
        path: For messages.
        handle: The file, decompressed and decoded.
        longest: Characters that an element may have.
    """

    def __init__(self, path: Path, handle: IO[str], *, longest: int) -> None:
        self.path = path
        self.handle = handle
        self.longest = longest
        self.buffer = ""
        self.line = 1
        self.decoder = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys, parse_constant=reject_constant)

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Yields the number and the value of each element.

        Raises:
            DataError: The text is not an array; the message names the line.
        """
        opening = self._next()
        if not opening:
            return
        if opening != "[":
            raise DataError(
                f"{self.path}:{self.line}: starts with {self.buffer[:10]!r}, which is neither a JSON array nor "
                "an object; check the file"
            )
        self._take(1)
        number = 0
        if self._next() == "]":
            return
        while True:
            number += 1
            yield number, self._element(number)
            mark = self._next()
            if mark not in (",", "]"):
                what = repr(self.buffer[:10]) if mark else "the end of the file"
                raise DataError(
                    f"{self.path}:{self.line}: not valid JSON: a comma or ] must follow element {number}, not {what}"
                )
            self._take(1)
            if mark == "]":
                break
        if self._next():
            raise DataError(f"{self.path}:{self.line}: there is text after the end of the JSON array; remove it")

    def _next(self) -> str:
        """Skips spaces and returns the next character, or "" at the end."""
        while True:
            trimmed = self.buffer.lstrip(SPACE)
            self._take(len(self.buffer) - len(trimmed))
            if self.buffer or not self._more(BLOCK_CHARACTERS):
                return self.buffer[:1]

    def _element(self, number: int) -> Any:
        self._next()
        block = BLOCK_CHARACTERS
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer)
            except json.JSONDecodeError as error:
                if not self._more(block):
                    line = self.line + self.buffer.count("\n", 0, error.pos)
                    raise DataError(
                        f"{self.path}:{line}: not valid JSON: {error.msg}, in element {number}; fix the file"
                    ) from error
            except RecursionError as error:
                raise DataError(
                    f"{self.path}:{self.line}: element {number} is nested too deeply; fix the file"
                ) from error
            except ValueError as error:
                raise DataError(f"{self.path}:{self.line}: element {number}: {error}; fix the file") from error
            else:
                if end < len(self.buffer) or not self._more(block):
                    self._take(end)
                    return value
            if len(self.buffer) > self.longest:
                raise DataError(
                    f"{self.path}:{self.line}: element {number} is longer than {self.longest:,} characters; check the "
                    "file, or raise data.limits.line_bytes"
                )
            block *= 2

    def _more(self, characters: int) -> bool:
        text = self.handle.read(characters)
        self.buffer += text
        return bool(text)

    def _take(self, count: int) -> None:
        self.line += self.buffer.count("\n", 0, count)
        self.buffer = self.buffer[count:]
