"""Prompt and completion: ``{"prompt", "completion", "system"?}``, both text or both lists of messages.

A prompt for sampled answers is ``{"prompt", "reference"?, "tests"?, "system"?}``.
"""

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


def read_prompt(row: Mapping[str, Any]) -> Conversation:
    """Reads a prompt, text or messages, with its reference as the answer; empty where it has none."""
    prompt, reference = require(row, "prompt"), row.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise BadRow("the reference is not text", f"it is a {type(reference).__name__}")
    if isinstance(prompt, list):
        before, _ = parse_messages(prompt, where="'prompt'")
    elif not require_text(row, "prompt").strip():
        raise BadRow("the prompt is empty")
    else:
        before = [{"role": "user", "content": prompt}]
    messages = [*system_message(row), *before, {"role": "assistant", "content": reference or ""}]
    marks: list[bool | None] = [False] * (len(messages) - 1) + [None]
    return Conversation(messages, train=marks, needs_answer=False)
