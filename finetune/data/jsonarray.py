"""A JSON array read element by element, so that the file need not fit into memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from finetune.errors import DataError

BLOCK_CHARACTERS = 1 << 20
SPACE = " \t\r\n"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different; JSON would silently keep the last."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


class ArrayReader:
    """Keeps one element and a block of text in memory.

    Args:
        path: Named in messages.
        handle: The file, decompressed and decoded.
    """

    def __init__(self, path: Path, handle: IO[str]) -> None:
        self.path = path
        self.handle = handle
        self.buffer = ""
        self.line = 1
        self.decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse_constant)

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Number and value of each element.

        Raises:
            DataError: Names the line where the text stops being an array.
        """
        opening = self._next()
        if not opening:
            return
        if opening != "[":
            raise DataError(
                f"{self.path}:{self.line}: starts with {self.buffer[:10]!r}, not with a JSON array or object; check the file"
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
            raise DataError(f"{self.path}:{self.line}: something follows the end of the JSON array; remove it")

    def _next(self) -> str:
        """The next character that is no space, or nothing at the end."""
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
                    at = self.line + self.buffer.count("\n", 0, error.pos)
                    raise DataError(
                        f"{self.path}:{at}: not valid JSON: {error.msg}, in element {number}; mend the file"
                    ) from error
            except ValueError as error:
                raise DataError(f"{self.path}:{self.line}: element {number}: {error}; mend the file") from error
            else:
                if end < len(self.buffer) or not self._more(block):
                    self._take(end)
                    return value
            block *= 2

    def _more(self, characters: int) -> bool:
        fresh = self.handle.read(characters)
        self.buffer += fresh
        return bool(fresh)

    def _take(self, count: int) -> None:
        self.line += self.buffer.count("\n", 0, count)
        self.buffer = self.buffer[count:]
