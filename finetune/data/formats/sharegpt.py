"""ShareGPT: ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}], "system"?, "tools"?}``."""

import json
from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Message
from finetune.data.formats.fields import as_list, as_text, kind_of, need, system_of, tools_of
from finetune.data.formats.messages import call_of

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "system": "system", "observation": "tool", "tool": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip


def read(row: Mapping[str, Any]) -> Conversation:
    listed = as_list(need(row, "conversations"), where="'conversations'")
    messages = system_of(row) + turns_of(listed)
    marks = [None] * (len(messages) - len(listed)) + [_mark(item) for item in listed]
    return Conversation(messages, train=marks if any(mark is not None for mark in marks) else None, tools=tools_of(row))


def turns_of(listed: list[Any]) -> list[Message]:
    return [turn(item, f"turn {number}") for number, item in enumerate(listed, 1)]


def turn(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise BadRow("a turn is not an object", f"{where} is {kind_of(item)}")
    for name in ("from", "value"):
        if item.get(name) is None:
            raise BadRow(f"a turn has no {name!r}", f"{where} has {', '.join(map(str, item)) or 'nothing'}")
    speaker = item["from"]
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow("a turn has an unknown speaker", f"{where} has {speaker!r}; known are {', '.join(ROLES)}")
    value = as_text(item["value"], where="the value of a turn")
    if speaker.lower() == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, where)}
    return {"role": role, "content": value}


def _calls(value: str, where: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except ValueError as error:
        raise BadRow("a function call is not JSON", f"{where}: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    return [call_of(call, where) for call in calls]


def _mark(item: Any) -> bool | None:
    mark = item.get("train") if isinstance(item, dict) else None
    if mark is None or isinstance(mark, bool):
        return mark
    raise BadRow("'train' of a turn is neither true nor false", f"it is {mark!r}")
