"""The tables of formats: how each is read, and which columns it has."""

from collections.abc import Callable, Mapping
from typing import Any

from finetune.data.conversation import Conversation
from finetune.data.formats import alpaca, guanaco, messages, pairs, preference, sharegpt, text

Row = Mapping[str, Any]

ColumnMapping = dict[str, str]
"""Column name of the format -> column name in the file."""

READERS: dict[str, Callable[[Row], Conversation]] = {
    "alpaca": alpaca.read,
    "messages": messages.read,
    "prompt_completion": pairs.read,
    "completion": text.read_completion,
    "sharegpt": sharegpt.read,
    "guanaco": guanaco.read,
    "text": text.read,
    "preference": preference.read,
    "unpaired": preference.read_unpaired,
    "prompt": pairs.read_prompt,
}

COLUMNS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion", "system"),
    "completion": ("prompt", "completion"),
    "sharegpt": ("conversations", "system", "tools"),
    "guanaco": ("text",),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "conversations", "system", "tools"),
    "unpaired": ("messages", "conversations", "prompt", "completion", "label", "system", "tools"),
    "prompt": ("prompt", "reference", "system"),
}
"""The columns of each format, which ``data.columns`` can map."""
