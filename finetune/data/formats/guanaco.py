"""OpenAssistant Guanaco: one text with ``### Human:`` and ``### Assistant:`` before the turns."""

import re
from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.formats.fields import text_of

MARKS = re.compile(r"(?:^|\n?)### (Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def read(row: Mapping[str, Any]) -> Conversation:
    before, *pieces = MARKS.split(text_of(row, "text"))
    if not pieces:
        raise BadRow("the text has no '### Human:'")
    if before.strip():
        raise BadRow("text stands before the first '### Human:'", repr(before.strip()[:40]))
    speakers, texts = pieces[::2], pieces[1::2]
    return Conversation(
        [{"role": ROLES[who], "content": said.strip()} for who, said in zip(speakers, texts, strict=True)]
    )
