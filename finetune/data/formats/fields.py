"""Reads one field of a row; raises `BadRow` with a reason where it does not have the format."""

import json
from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Message


def require(row: Mapping[str, Any], name: str) -> Any:
    """Returns a column that must exist and must not be null."""
    if name not in row:
        raise BadRow(f"column {name!r} is missing", f"the row has {', '.join(map(str, row)) or 'none'}")
    if row[name] is None:
        raise BadRow(f"column {name!r} is null")
    return row[name]


def require_text(row: Mapping[str, Any], name: str) -> str:
    """Returns a column that must be text."""
    return as_text(require(row, name), where=f"column {name!r}")


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """Returns the text, or "" where the column is missing or null."""
    value = row.get(name)
    return "" if value is None else as_text(value, where=f"column {name!r}")


def as_text(value: Any, *, where: str) -> str:
    """Returns a value that must be text."""
    if isinstance(value, str):
        return value
    raise BadRow(f"{where} is not text", f"it is {json_type(value)}; write it as text")


def as_list(value: Any, *, where: str) -> list[Any]:
    """Returns a value that must be a list, perhaps as JSON inside a string, as in CSV files and tool columns, or as an
    object of lists of one length, as ``datasets`` stores it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"{where} is text that is not JSON", str(error)) from error
    if isinstance(value, dict) and value and all(isinstance(item, list) for item in value.values()):
        value = _turned(value, where=where)
    if isinstance(value, list):
        return value
    raise BadRow(f"{where} is not a list", f"it is {json_type(value)}")


def _turned(lists: dict[str, list[Any]], *, where: str) -> list[Any]:
    """Returns an object of lists as a list of objects: how ``datasets`` stores a list of objects in a column."""
    if len({len(items) for items in lists.values()}) > 1:
        lengths = ", ".join(f"{name}: {len(items)}" for name, items in lists.items())
        raise BadRow(f"{where} is an object of lists of different lengths", lengths)
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def system_message(row: Mapping[str, Any]) -> list[Message]:
    """Returns the row's system message, if it has one."""
    system = optional_text(row, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def read_tests(value: Any) -> str:
    """Returns the source code of the tests; a list of statements, as in MBPP, is joined by line breaks."""
    if isinstance(value, str):
        return value
    return "\n".join(as_text(line, where="a line of column 'tests'") for line in as_list(value, where="column 'tests'"))


def read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """Returns the schemas of the tools, and adds OpenAI's outer ``function`` object where it is missing."""
    value = row.get("tools")
    if value is None or value == "" or value == []:
        return None
    tools = as_list(value, where="column 'tools'")
    if not tools:
        return None
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise BadRow("a tool is not an object", f"tool {number} is {json_type(tool)}")
        inner = tool.get("function", tool)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow("a tool has no name", f"tool {number}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def json_type(value: Any) -> str:
    """Returns JSON's name of a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def with_own_names(reason: str, columns: Mapping[str, str]) -> str:
    """Returns a reason with the file's names of columns in place of the format's."""
    for column, actual in columns.items():
        reason = reason.replace(f"column {column!r}", f"column {actual!r}")
    return reason
