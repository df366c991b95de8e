"""Raw text, without a chat template: all of it is learnt (``text``), or what follows a prompt (``completion``)."""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.formats.fields import text_of


def read(row: Mapping[str, Any]) -> Conversation:
    return Conversation([], parts=[(text_of(row, "text"), True)])


def read_completion(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
    if not completion.strip():
        raise BadRow("the answer is empty")
    return Conversation([], parts=[(prompt, False), (completion, True)])
