"""``{"prompt", "completion", "system"?}``: both text, or both lists of messages."""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.formats.fields import need, system_of, text_of
from finetune.data.formats.messages import turns


def read(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = need(row, "prompt"), need(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        asked, _ = turns(prompt, where="'prompt'")
        answered, _ = turns(completion, where="'completion'")
        marks: list[bool | None] = [False] * len(asked) + [None] * len(answered)
        return Conversation([*asked, *answered], train=marks)
    if not text_of(row, "prompt").strip():
        raise BadRow("the prompt is empty")
    answer = {"role": "assistant", "content": text_of(row, "completion")}
    return Conversation([*system_of(row), {"role": "user", "content": prompt}, answer])
