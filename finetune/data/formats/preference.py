"""Preference data: a chosen and a rejected answer to one prompt, or single answers labelled good or bad."""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Message
from finetune.data.formats import messages, sharegpt
from finetune.data.formats.fields import as_list, json_type, read_tools, require, require_text, system_message
from finetune.data.formats.messages import parse_messages


def read(row: Mapping[str, Any]) -> Conversation:
    """Reads one row of a chosen and a rejected answer."""
    chosen, rejected = require(row, "chosen"), require(row, "rejected")
    prompt = _prompt(row)
    chosen_turns, rejected_turns = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    if len(chosen_turns) > 1 or len(rejected_turns) > 1:
        prompt, chosen_turns, rejected_turns = _last_turns(prompt, chosen_turns, rejected_turns)
    if rejected_turns[0]["role"] != "assistant":
        raise BadRow("the rejected answer is not the assistant's", f"it is the {rejected_turns[0]['role']}'s")
    if chosen_turns[0] == rejected_turns[0]:
        raise BadRow("the chosen and the rejected answer are the same")
    if not rejected_turns[0]["content"].strip() and not rejected_turns[0].get("tool_calls"):
        raise BadRow("the rejected answer is empty")
    return Conversation([*prompt, chosen_turns[0]], rejected=rejected_turns[0], tools=read_tools(row))


def read_unpaired(row: Mapping[str, Any]) -> Conversation:
    """Reads one row of an answer and its label."""
    label = require(row, "label")
    if not isinstance(label, bool):
        raise BadRow("the label is neither true nor false", f"it is {json_type(label)}")
    if "completion" in row:
        conversation = Conversation(
            [*_prompt(row), *_turns(require(row, "completion"), "completion")], tools=read_tools(row)
        )
    else:
        conversation = sharegpt.read(row) if "conversations" in row else messages.read(row)
    conversation.desirable = label
    return conversation


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    if "conversations" in row:
        return system_message(row) + sharegpt.parse_turns(
            as_list(require(row, "conversations"), where="'conversations'")
        )
    if "prompt" not in row:
        return system_message(row)
    if isinstance(row["prompt"], list):
        return system_message(row) + _parse(row["prompt"], "prompt")
    return [*system_message(row), {"role": "user", "content": require_text(row, "prompt")}]


def _turns(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = _parse([value] if isinstance(value, dict) else value, name)
    if not turns:
        raise BadRow(f"{name!r} is empty")
    return turns


def _parse(value: Any, name: str) -> list[Message]:
    """Parses OpenAI's messages or ShareGPT's turns."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and "from" in first:
        return sharegpt.parse_turns(value)
    return parse_messages(value, where=f"{name!r}")[0]


def _last_turns(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Separates the last turns of two conversations, which must be the same before; a repeated prompt counts once."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the chosen and the rejected conversation differ before the last turn")
    before = chosen[:-1]
    if before[-len(prompt) :] == prompt or prompt[-len(before) :] == before:
        return max(prompt, before, key=len), chosen[-1:], rejected[-1:]
    return prompt + before, chosen[-1:], rejected[-1:]
