"""OpenAssistant Guanaco: one text in which ``### Human:`` and ``### Assistant:`` precede the turns."""

import re
from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.formats.fields import require_text

MARKS = re.compile(r"(?:^|\n?)### (Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def read(row: Mapping[str, Any]) -> Conversation:
    """Reads one row."""
    before, *pieces = MARKS.split(require_text(row, "text"))
    if not pieces:
        raise BadRow("the text has no '### Human:'")
    if before.strip():
        raise BadRow("there is text before the first '### Human:'", repr(before.strip()[:40]))
    speakers, texts = pieces[::2], pieces[1::2]
    turns = zip(speakers, texts, strict=True)
    return Conversation([{"role": ROLES[speaker], "content": text.strip()} for speaker, text in turns])
