"""Raw text without a chat template. Loss is on all of it (``text``) or on what follows a prompt (``completion``)."""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.formats.fields import require_text


def read(row: Mapping[str, Any]) -> Conversation:
    """Reads one row of text."""
    return Conversation([], parts=[(require_text(row, "text"), True)])


def read_completion(row: Mapping[str, Any]) -> Conversation:
    """Reads one row of a prompt and a completion."""
    prompt, completion = require_text(row, "prompt"), require_text(row, "completion")
    if not completion.strip():
        raise BadRow("the answer is empty")
    return Conversation([], parts=[(prompt, False), (completion, True)])
