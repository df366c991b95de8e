"""OpenAI's messages: ``{"messages": [{"role", "content", "tool_calls"?, "train"? or "weight"?}], "tools"?}``."""

import json
from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Message
from finetune.data.formats.fields import as_list, as_text, json_type, read_tools, require
from finetune.data.thoughts import KEYS

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
}


def read(row: Mapping[str, Any]) -> Conversation:
    """Reads one row."""
    messages, train = parse_messages(require(row, "messages"))
    return Conversation(messages, train=train, tools=read_tools(row))


def parse_messages(value: Any, *, where: str = "'messages'") -> tuple[list[Message], list[bool | None] | None]:
    """Returns the messages of a list, and whether each is trained on, where any of them has a mark."""
    listed = as_list(value, where=where)
    messages = [_message(item, number) for number, item in enumerate(listed, 1)]
    marks = [_mark(item, number) for number, item in enumerate(listed, 1)]
    return messages, (marks if any(mark is not None for mark in marks) else None)


def _message(item: Any, number: int) -> Message:
    where = f"message {number}"
    if not isinstance(item, dict):
        raise BadRow("a message is not an object", f"{where} is {json_type(item)}")
    if "role" not in item:
        raise BadRow("a message has no role", f"{where} has {', '.join(map(str, item)) or 'nothing'}")
    role = ROLES.get(item["role"]) if isinstance(item["role"], str) else None
    if role is None:
        raise BadRow("a message has an unknown role", f"{where} has {item['role']!r}; known are {', '.join(ROLES)}")
    calls = item.get("tool_calls")
    message: Message = {"role": role, "content": _content(item, where, may_be_empty=bool(calls))}
    if calls:
        message["tool_calls"] = [
            parse_tool_call(call, where) for call in as_list(calls, where=f"tool_calls of {where}")
        ]
    for name in ("name", "tool_call_id"):
        if item.get(name) is not None:
            message[name] = as_text(item[name], where=f"{name} of a message")
    thought = next((name for name in KEYS if item.get(name) is not None), None)
    if thought:
        message[KEYS[0]] = as_text(item[thought], where=f"{thought} of a message")
    return message


def _content(item: dict[str, Any], where: str, *, may_be_empty: bool) -> str:
    content = item.get("content")
    if content is None:
        if may_be_empty:
            return ""
        raise BadRow("a message has no content", where)
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    return as_text(content, where="the content of a message")


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else json_type(part)
    raise BadRow("a message contains something other than text", f"{where} contains {kind}")


def parse_tool_call(call: Any, where: str) -> dict[str, Any]:
    """Returns a tool call in OpenAI's form, with arguments parsed from JSON, as templates expect them."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call has no name", where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise BadRow("the arguments of a tool call are not JSON", f"{where}: {error}") from error
    identifier = {"id": call["id"]} if "id" in call else {}
    return {"type": "function", **identifier, "function": {"name": function["name"], "arguments": arguments}}


def _mark(item: dict[str, Any], number: int) -> bool | None:
    """Reads whether a message is trained on: ``train``, or OpenAI's ``weight`` (0 or 1)."""
    mark = item.get("train", item.get("weight"))
    if mark is None or isinstance(mark, bool):
        return mark
    if mark in (0, 1):
        return bool(mark)
    raise BadRow("'train' of a message is neither true nor false", f"message {number} has {mark!r}")
