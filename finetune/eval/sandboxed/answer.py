"""The process of the program: loads it, then does what the tests ask for."""

import asyncio
import inspect
import io
import operator
import socket
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import restrict
import values

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "await": lambda coroutine: asyncio.run(coroutine),
    "isinstance": isinstance,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "format": format,
    "hash": hash,
    "pow": pow,
    "divmod": divmod,
}
"""What the tests may ask for, by name; names of the module `operator` too."""


class Answer:
    """Serves the tests until they end."""

    def __init__(self, connection: socket.socket) -> None:
        self._link = values.Link(connection, refer=self._refer, resolve=self._resolve)
        self._objects: list[Any] = []
        self._places: dict[int, int] = {}
        self._module = types.ModuleType("program")
        sys.modules["program"] = self._module

    def serve(self) -> None:
        """Answers every message, until the other process has ended."""
        restrict.restrict(self._link.receive()[1])
        while True:
            self._answer(*self._link.receive())

    def _answer(self, kind: str, operation: str, arguments: list[Any], named: dict[str, Any]) -> None:
        sys.stdout = output = io.StringIO()
        try:
            value = self._operation(operation)(*arguments, **named)
            self._link.send("value", value, [arguments, named], output.getvalue())
        except values.Ended:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a program raises, SystemExit too, is its result
            self._raised(error, [arguments, named], output.getvalue())

    def _raised(self, error: BaseException, arguments: list[Any], output: str) -> None:
        text = ""
        with suppress(Exception):
            text = str(error)[:1000]
        try:
            self._link.send("error", [type(error), error.args, text, error], arguments, output)
        except values.Ended:
            raise
        except BaseException:  # noqa: BLE001 - its arguments have no end, or their own errors
            self._link.send("error", [RuntimeError, (), f"{type(error).__name__}: {text}", None], [[], {}], "")

    def _operation(self, name: str) -> Callable[..., Any]:
        if name == "load":
            return self._load
        if name == "name":
            return self._module.__dict__.__getitem__
        return OPERATIONS.get(name) or getattr(operator, name)

    def _load(self, program: str) -> None:
        exec(compile(program, "program.py", "exec"), self._module.__dict__)

    def _ask(self, function: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Calls a function of the tests."""
        self._link.send("call", function, list(arguments), named)
        while True:
            kind, *content = self._link.receive()
            if kind == "value":
                return content[0]
            if kind == "error":
                name, text = content
                raise _exception(name)(text)
            self._answer(kind, *content)

    def _refer(self, value: Any) -> list[Any]:
        if isinstance(value, Callback):
            return ["yours", value.number]
        if id(value) not in self._places:
            self._places[id(value)] = len(self._objects)
            self._objects.append(value)
        reference = ["mine", self._places[id(value)]]
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = [self._link.encode(base) for base in value.__bases__ if issubclass(base, BaseException)]
            return ["exception", reference[1], value.__name__, bases]
        return ["coroutine", reference[1]] if inspect.iscoroutine(value) else reference

    def _resolve(self, owner: str, number: int) -> Any:
        return self._objects[number] if owner == "yours" else Callback(self._ask, number)


class Callback:
    """A function of the tests."""

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        self._ask, self.number = ask, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask(self.number, arguments, named)


def _exception(name: str) -> type[Exception]:
    kind = getattr(__import__("builtins"), name, None)
    return kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError


def serve(connection: socket.socket) -> None:
    """Runs the program's process to its end."""
    with suppress(values.Ended):
        Answer(connection).serve()
