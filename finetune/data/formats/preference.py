"""Two answers to one prompt, the better one first; or single answers marked good or bad."""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Message
from finetune.data.formats.fields import kind_of, need, system_of, text_of
from finetune.data.formats.messages import turns
from finetune.data.formats.sharegpt import turn


def read(row: Mapping[str, Any]) -> Conversation:
    chosen, rejected = need(row, "chosen"), need(row, "rejected")
    prompt = _prompt(row)
    chosen_turns, rejected_turns = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    if len(chosen_turns) > 1 or len(rejected_turns) > 1:
        prompt, chosen_turns, rejected_turns = _shared(prompt, chosen_turns, rejected_turns)
    if chosen_turns[0]["content"] == rejected_turns[0]["content"]:
        raise BadRow("the chosen and the rejected answer are the same")
    if not rejected_turns[0]["content"].strip():
        raise BadRow("the rejected answer is empty")
    return Conversation([*prompt, chosen_turns[0]], rejected=rejected_turns[0])


def read_unpaired(row: Mapping[str, Any]) -> Conversation:
    label = need(row, "label")
    if not isinstance(label, bool):
        raise BadRow("the label is neither true nor false", f"it is {kind_of(label)}")
    if "messages" in row:
        messages, train = turns(row["messages"])
        return Conversation(messages, train=train, desirable=label)
    completion = _turns(need(row, "completion"), "completion")
    return Conversation([*_prompt(row), *completion], desirable=label)


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    if "conversations" in row:
        return system_of(row) + [turn(item, f"turn {number}") for number, item in enumerate(need(row, "conversations"), 1)]
    if "prompt" not in row:
        return system_of(row)
    if isinstance(row["prompt"], list):
        return turns(row["prompt"], where="'prompt'")[0]
    return [*system_of(row), {"role": "user", "content": text_of(row, "prompt")}]


def _turns(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return [turn(value, name)] if "from" in value else turns([value], where=f"{name!r}")[0]
    listed = turns(value, where=f"{name!r}")[0]
    if not listed:
        raise BadRow(f"{name!r} is empty")
    return listed


def _shared(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Whole conversations on both sides: all but the last turn must be the same."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the chosen and the rejected conversation differ before the last turn")
    return prompt + chosen[:-1], chosen[-1:], rejected[-1:]
