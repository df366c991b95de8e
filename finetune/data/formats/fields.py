"""Reading one field of a row, with a reason where it is not what the format says."""

import json
from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Message


def need(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRow(f"column {name!r} is missing", f"the row has {', '.join(map(str, row)) or 'none'}")
    if row[name] is None:
        raise BadRow(f"column {name!r} is null")
    return row[name]


def text_of(row: Mapping[str, Any], name: str) -> str:
    return as_text(need(row, name), where=f"column {name!r}")


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """The text, or nothing where the column is missing or null."""
    value = row.get(name)
    return "" if value is None else as_text(value, where=f"column {name!r}")


def as_text(value: Any, *, where: str) -> str:
    if isinstance(value, str):
        return value
    raise BadRow(f"{where} is not text", f"it is {kind_of(value)}")


def as_list(value: Any, *, where: str) -> list[Any]:
    if isinstance(value, str):
        value = parsed(value, where=where)
    if isinstance(value, list):
        return value
    raise BadRow(f"{where} is not a list", f"it is {kind_of(value)}")


def parsed(value: str, *, where: str) -> Any:
    """JSON inside a string, as CSV files and tool columns hold it."""
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(f"{where} is text that is not JSON", str(error)) from error


def system_of(row: Mapping[str, Any]) -> list[Message]:
    system = optional_text(row, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def tests_of(value: Any) -> str:
    """Source that judges an answer; a list of statements, as MBPP has it, stands on lines of their own."""
    if isinstance(value, str):
        return value
    return "\n".join(as_text(line, where="a line of column 'tests'") for line in as_list(value, where="column 'tests'"))


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools' schemas; OpenAI's outer ``function`` object is added where the row leaves it out."""
    value = row.get("tools")
    if value is None or value == "" or value == []:
        return None
    tools = as_list(value, where="column 'tools'")
    if not tools:
        return None
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise BadRow("a tool is not an object", f"tool {number} is {kind_of(tool)}")
        inner = tool.get("function", tool)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow("a tool has no name", f"tool {number}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def kind_of(value: Any) -> str:
    """JSON's word for a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)
