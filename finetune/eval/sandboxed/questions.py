"""The process of the tests: every name that they do not define themselves is asked of the program's process."""

import builtins
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

import values

ENDED = "ended before its last line"
MIXED = (
    "the operator {} of the program's {} and the tests' {} gives {}; the tests compare plain values only, so let the "
    "program return one"
)


def run_tests(connection: socket.socket, request: dict[str, Any]) -> str:
    """Runs a request's program in the other process and its tests in this one.

    Returns:
        Why they failed; an empty string if the tests ran to their end.
    """
    program = Program(connection)
    sys.modules["program"] = ProgramModule(program)
    try:
        program.send("limits", request["limits"])
        program.ask("load", request["program"])
        code = compile(request["tests"], "tests.py", "exec", dont_inherit=True)
        exec(code, Names(program, __name__="tests"))
        program.ask("bool", True)  # it is still there, even if the tests ignored its end
    except values.Ended:
        return ENDED
    except BaseException as error:  # noqa: BLE001 - whatever the tests raise is their failure
        return f"{type(error).__name__}: {error}".removesuffix(": ")[:200]
    return ""


class Program:
    """The program's process, as the tests see it."""

    def __init__(self, connection: socket.socket) -> None:
        self._link = values.Link(connection, refer=self._refer, resolve=self._resolve)
        self.send = self._link.send
        self._objects: dict[int, Any] = {}
        self._functions: list[Any] = []

    def ask(self, operation: str, *arguments: Any, **named: Any) -> Any:
        """Does an operation there and returns its value; what it raises is raised here.

        Raises:
            Ended: The process has ended.
        """
        self.send("do", operation, list(arguments), named)
        while True:
            kind, *content = self._link.receive()
            if kind == "call":
                self._call(*content)
                continue
            result, changed, output = content
            sys.stdout.write(output)
            values.update([list(arguments), named], changed)
            if kind == "value":
                return result
            raise _raised(*result)

    def _call(self, number: int, arguments: list[Any], named: dict[str, Any]) -> None:
        try:
            value = self._functions[number](*arguments, **named)
        except Exception as error:  # noqa: BLE001 - the program may catch it
            self.send("error", type(error).__name__, str(error))
        else:
            self.send("value", value)

    def _refer(self, value: Any) -> list[Any]:
        number = vars(value).get("_number") if isinstance(value, Remote | type) else None
        if number is not None:
            return ["yours", number]
        if not callable(value):
            raise TypeError(
                f"the tests give the program a {type(value).__name__}, and they run in another process: it takes "
                "plain values and functions"
            )
        self._functions.append(value)
        return ["mine", len(self._functions) - 1]

    def _resolve(self, form: str, number: int, name: str = "", bases: list[Any] | None = None) -> Any:
        if form == "yours":
            return self._functions[number]
        if number not in self._objects:
            self._objects[number] = Remote(self, number)
            if form == "exception":
                parents = tuple(self._link.decode(base) for base in bases or ())
                self._objects[number] = type(name, (RemoteError, *parents), {"_number": number})
        return self._coroutine(number) if form == "coroutine" else self._objects[number]

    async def _coroutine(self, number: int) -> Any:
        return self.ask("await", self._objects[number])


class Names(dict[str, Any]):
    """The names of the tests. Those that Python has are Python's, whatever the program defines."""

    def __init__(self, program: Program, **own: Any) -> None:
        super().__init__(own)
        self._program = program

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        return self._program.ask("name", name)


class ProgramModule(types.ModuleType):
    """The program, for ``from program import name``."""

    def __init__(self, program: Program) -> None:
        super().__init__("program")
        self._program = program

    def __getattr__(self, name: str) -> Any:
        try:
            return self._program.ask("name", name)
        except KeyError as error:
            raise AttributeError(name) from error


class Remote:
    """An object of the program that cannot be copied; what the tests do with it happens there."""

    def __init__(self, program: Program, number: int) -> None:
        vars(self).update(_program=program, _number=number)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._program.ask("delattr", self, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.ask("call", self, *arguments, **named)

    def __eq__(self, other: object) -> Any:
        return self._program.ask("eq", self, other) if isinstance(other, Remote) else NotImplemented

    def __ne__(self, other: object) -> Any:
        return self._program.ask("ne", self, other) if isinstance(other, Remote) else NotImplemented

    def __hash__(self) -> int:
        return int(self._program.ask("hash", self))

    def __format__(self, form: str) -> str:
        return str(self._program.ask("format", self, form))

    def __instancecheck__(self, value: object) -> bool:
        return bool(self._program.ask("isinstance", value, self))

    def __enter__(self) -> Any:
        return self._program.ask("call", self.__getattr__("__enter__"))

    def __exit__(self, kind: type | None, *_: object) -> Any:
        return self._program.ask("call", self.__getattr__("__exit__"), kind, None, None)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        raise TypeError("the tests derive from a class of the program, and they run in another process")


class RemoteError(BaseException):
    """A class of exceptions that the program defines."""

    def __str__(self) -> str:
        return str(vars(self).get("_text", super().__str__()))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_there"], name)


def _raised(kind: type[BaseException], arguments: tuple[Any, ...], text: str, there: Any) -> BaseException:
    """Returns the exception that the program raised."""
    try:
        error = kind(*arguments)
    except Exception:  # noqa: BLE001 - its constructor takes something else
        error = RuntimeError(f"{kind.__name__}: {text}")
    if isinstance(error, RemoteError):
        vars(error).update(_text=text, _there=there)
    return error


def _unary(operation: str) -> Callable[[Remote], Any]:
    return lambda self: self._program.ask(operation, self)


def _binary(operation: str, *, reflected: bool = False) -> Callable[[Remote, Any], Any]:
    """Returns an operator. Of the program's object and a plain value it may give another object, but no plain value.

    An object that answers every comparison as the tests want it would pass them all.
    """

    def apply(self: Remote, other: Any) -> Any:
        result = self._program.ask(operation, *((other, self) if reflected else (self, other)))
        if isinstance(other, Remote) or isinstance(result, Remote):
            return result
        kinds = self.__getattr__("__class__").__getattr__("__name__"), type(other).__name__, type(result).__name__
        raise TypeError(MIXED.format(operation, *kinds))

    return apply


for _name in ("iter", "next", "len", "bool", "str", "repr"):
    setattr(Remote, f"__{_name}__", _unary(_name))
for _name in ("getitem", "contains"):
    setattr(Remote, f"__{_name}__", lambda self, key, _name=_name: self._program.ask(_name, self, key))
setattr(Remote, "__setitem__", lambda self, key, value: self._program.ask("setitem", self, key, value))  # noqa: B010
setattr(Remote, "__delitem__", lambda self, key: self._program.ask("delitem", self, key))  # noqa: B010
for _name in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _binary(_name))
for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
    "lshift",
    "rshift",
):
    setattr(Remote, f"__{_name.strip('_')}__", _binary(_name))
    setattr(Remote, f"__r{_name.strip('_')}__", _binary(_name, reflected=True))
