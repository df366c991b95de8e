"""ShareGPT: ``{"conversations": [{"from": "human" or "gpt", "value": ...}, ...], "system"?, "tools"?}``."""

import json
from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Message
from finetune.data.formats.fields import as_list, as_text, json_type, read_tools, require, system_message
from finetune.data.formats.messages import parse_tool_call

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}


def read(row: Mapping[str, Any]) -> Conversation:
    """Reads one row."""
    turns = as_list(require(row, "conversations"), where="'conversations'")
    messages = system_message(row) + parse_turns(turns)
    marks = [None] * (len(messages) - len(turns)) + [_mark(turn) for turn in turns]
    return Conversation(
        messages, train=marks if any(mark is not None for mark in marks) else None, tools=read_tools(row)
    )


def parse_turns(turns: list[Any]) -> list[Message]:
    """Returns the turns as messages."""
    return [_parse_turn(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]


def _parse_turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("a turn is not an object", f"{where} is {json_type(turn)}")
    for name in ("from", "value"):
        if turn.get(name) is None:
            raise BadRow(f"a turn has no {name!r}", f"{where} has {', '.join(map(str, turn)) or 'nothing'}")
    speaker = turn["from"]
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow("a turn has an unknown speaker", f"{where} has {speaker!r}; known are {', '.join(ROLES)}")
    value = as_text(turn["value"], where="the value of a turn")
    if speaker.lower() == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, where)}
    return {"role": role, "content": value}


def _calls(value: str, where: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except ValueError as error:
        raise BadRow("a function call is not JSON", f"{where}: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    return [parse_tool_call(call, where) for call in calls]


def _mark(turn: Any) -> bool | None:
    mark = turn.get("train") if isinstance(turn, dict) else None
    if mark is None or isinstance(mark, bool):
        return mark
    raise BadRow("'train' of a turn is neither true nor false", f"it is {mark!r}")
