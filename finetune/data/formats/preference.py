"""Two answers to one prompt, the better one first; or single answers marked good or bad."""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Message
from finetune.data.formats import sharegpt
from finetune.data.formats.fields import as_list, kind_of, need, system_of, text_of, tools_of
from finetune.data.formats.messages import turns


def read(row: Mapping[str, Any]) -> Conversation:
    chosen, rejected = need(row, "chosen"), need(row, "rejected")
    prompt = _prompt(row)
    chosen_turns, rejected_turns = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    if len(chosen_turns) > 1 or len(rejected_turns) > 1:
        prompt, chosen_turns, rejected_turns = _shared(prompt, chosen_turns, rejected_turns)
    if rejected_turns[0]["role"] != "assistant":
        raise BadRow("the rejected answer is not the assistant's", f"it is the {rejected_turns[0]['role']}'s")
    if chosen_turns[0] == rejected_turns[0]:
        raise BadRow("the chosen and the rejected answer are the same")
    if not rejected_turns[0]["content"].strip() and not rejected_turns[0].get("tool_calls"):
        raise BadRow("the rejected answer is empty")
    return Conversation([*prompt, chosen_turns[0]], rejected=rejected_turns[0], tools=tools_of(row))


def read_unpaired(row: Mapping[str, Any]) -> Conversation:
    label = need(row, "label")
    if not isinstance(label, bool):
        raise BadRow("the label is neither true nor false", f"it is {kind_of(label)}")
    if "completion" in row:
        whole = Conversation([*_prompt(row), *_turns(need(row, "completion"), "completion")], tools=tools_of(row))
    else:
        whole = sharegpt.read(row) if "conversations" in row else _messages(row)
    whole.desirable = label
    return whole


def _messages(row: Mapping[str, Any]) -> Conversation:
    listed, train = turns(need(row, "messages"))
    return Conversation(listed, train=train, tools=tools_of(row))


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    if "conversations" in row:
        return system_of(row) + sharegpt.turns_of(as_list(need(row, "conversations"), where="'conversations'"))
    if "prompt" not in row:
        return system_of(row)
    if isinstance(row["prompt"], list):
        return system_of(row) + _listed(row["prompt"], "prompt")
    return [*system_of(row), {"role": "user", "content": text_of(row, "prompt")}]


def _turns(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    listed = _listed([value] if isinstance(value, dict) else value, name)
    if not listed:
        raise BadRow(f"{name!r} is empty")
    return listed


def _listed(value: Any, name: str) -> list[Message]:
    """OpenAI's messages or ShareGPT's turns."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and "from" in first:
        return sharegpt.turns_of(value)
    return turns(value, where=f"{name!r}")[0]


def _shared(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Whole conversations on both sides: all but the last turn must be the same, and a prompt that they repeat counts once."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the chosen and the rejected conversation differ before the last turn")
    before = chosen[:-1]
    if before[-len(prompt) :] == prompt or prompt[-len(before) :] == before:
        return max(prompt, before, key=len), chosen[-1:], rejected[-1:]
    return prompt + before, chosen[-1:], rejected[-1:]
