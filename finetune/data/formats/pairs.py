"""Prompt and completion: ``{"prompt", "completion", "system"?}``, both text or both lists of messages."""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.formats.fields import require, require_text, system_message
from finetune.data.formats.messages import parse_messages


def read(row: Mapping[str, Any]) -> Conversation:
    """Reads one row."""
    prompt, completion = require(row, "prompt"), require(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before, _ = parse_messages(prompt, where="'prompt'")
        after, _ = parse_messages(completion, where="'completion'")
        marks: list[bool | None] = [False] * len(before) + [None] * len(after)
        return Conversation([*before, *after], train=marks)
    if not require_text(row, "prompt").strip():
        raise BadRow("the prompt is empty")
    answer = {"role": "assistant", "content": require_text(row, "completion")}
    return Conversation([*system_message(row), {"role": "user", "content": prompt}, answer])
