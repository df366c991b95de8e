"""Carries values between the process of the tests and the one of the program, as lines of JSON.

Plain data are copied, so that what the tests compare is theirs. Everything else stays where it is and is referred to.
"""

import builtins
import importlib
import json
import socket
import sys
import types
from collections import deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

SCALARS = (bool, int, str)
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
TEXTS: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    float: (float.hex, float.fromhex),
    bytes: (bytes.hex, bytes.fromhex),
    bytearray: (bytearray.hex, bytearray.fromhex),
    Decimal: (Decimal.__str__, Decimal),
    Fraction: (Fraction.__str__, Fraction),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    date: (date.isoformat, date.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
}
"""Types that a text describes in full: how it is written and read."""

BASES = (*SCALARS, *SEQUENCES.values(), *TEXTS, dict)
"""A value of a derived class, such as a namedtuple, is copied as its base."""

ARRAYS = ("numpy",)
"""Packages whose arrays are copied."""


class Ended(BaseException):
    """The other process has ended."""


class Link:
    """A connection for messages, with values encoded by ``refer`` and decoded by ``resolve``.

    Args:
        connection: To the other process.
        refer: Returns a reference to a value that is not copied.
        resolve: Returns the value of a reference.
    """

    def __init__(
        self, connection: socket.socket, *, refer: Callable[[Any], list[Any]], resolve: Callable[..., Any]
    ) -> None:
        self._reader, self._writer = connection.makefile("rb"), connection.makefile("wb")
        self._refer, self._resolve = refer, resolve

    def send(self, kind: str, *content: Any) -> None:
        """Sends a message; every part of its content is a value.

        Raises:
            Ended: Nobody is there to read it.
        """
        line = json.dumps([kind, *map(self.encode, content)]).encode()
        try:
            self._writer.write(line + b"\n")
            self._writer.flush()
        except OSError as error:
            raise Ended from error

    def receive(self) -> list[Any]:
        """Waits for a message and returns its kind and its content.

        Raises:
            Ended: None came, or what came is not a message.
        """
        try:
            kind, *content = json.loads(self._reader.readline())
            return [str(kind), *map(self.decode, content)]
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise Ended from error

    def encode(self, value: Any) -> Any:
        """Returns a value as JSON: a scalar as it is, all else as a list that begins with its form."""
        if type(value) is int and value.bit_length() > 64:  # in decimal it would take long
            return ["int", hex(value)]
        if value is None or type(value) in SCALARS:
            return value
        base = next((base for base in type(value).__mro__ if base in BASES), object)
        if base in SCALARS:
            return self.encode(int.__int__(value) if base is int else str.__str__(value))
        if base in TEXTS:
            return [base.__name__, TEXTS[base][0](value)]
        if base is dict:
            return ["dict", *([self.encode(key), self.encode(item)] for key, item in dict.items(value))]
        if base in SEQUENCES.values():
            return [base.__name__, *map(self.encode, base.__iter__(value))]  # type: ignore[attr-defined]
        if type(value) is complex:
            return ["complex", value.real.hex(), value.imag.hex()]
        if type(value) is range:
            return ["range", value.start, value.stop, value.step]
        if type(value) is timedelta:
            return ["timedelta", value.days, value.seconds, value.microseconds]
        if isinstance(value, type) and getattr(builtins, name := str(getattr(value, "__name__", "")), None) is value:
            return ["type", name]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if type(value).__module__ in ARRAYS and hasattr(value, "tolist"):
            return ["array", value.dtype.str, self.encode(value.tolist())] if value.shape else value.item()
        return ["reference", *self._refer(value)]

    def decode(self, node: Any) -> Any:
        """Returns the value that `encode` described."""
        if not isinstance(node, list):
            return node
        form, *items = node
        if form in SEQUENCES:
            return SEQUENCES[form](map(self.decode, items))
        if form == "dict":
            return {self.decode(key): self.decode(item) for key, item in items}
        for kind, (_, read) in TEXTS.items():
            if form == kind.__name__:
                return read(*items)
        if form == "int":
            return int(items[0], 16)
        if form == "complex":
            return complex(*map(float.fromhex, items))
        if form in ("range", "timedelta"):
            return {"range": range, "timedelta": timedelta}[form](*items)
        if form == "type":
            return _builtin_type(*items)
        if form == "module":
            return _module(*items)
        if form == "array":
            import numpy

            return numpy.array(self.decode(items[1]), dtype=items[0])
        if form != "reference":
            raise ValueError(form)
        return self._resolve(*items)


def update(mine: Any, theirs: Any) -> Any:
    """Makes a container of ours equal to the copy that came back, in place; returns it, or else the copy."""
    if type(mine) is not type(theirs) or not isinstance(mine, list | dict | set | deque | bytearray | tuple):
        return theirs
    if isinstance(mine, tuple):
        return tuple(update(*pair) for pair in zip(mine, theirs, strict=False)) if len(mine) == len(theirs) else theirs
    if isinstance(mine, dict):
        items = {key: update(mine.get(key), item) for key, item in theirs.items()}
        mine.clear()
        mine.update(items)
    elif isinstance(mine, list) and len(mine) == len(theirs):
        mine[:] = [update(*pair) for pair in zip(mine, theirs, strict=True)]
    elif isinstance(mine, list | bytearray):
        mine[:] = theirs
    else:
        mine.clear()
        (mine.update if isinstance(mine, set) else mine.extend)(theirs)
    return mine


def _builtin_type(name: str) -> type:
    kind = getattr(builtins, name)
    if not isinstance(kind, type):
        raise ValueError(name)
    return kind


def _module(name: str) -> Any:
    if name.partition(".")[0] not in {*sys.stdlib_module_names, *ARRAYS}:
        raise ValueError(name)
    return importlib.import_module(name)
