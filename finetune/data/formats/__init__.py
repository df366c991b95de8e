"""Known shapes of rows. A new format is one file here and one line in each table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.data.conversation import Conversation
from finetune.data.formats import alpaca, guanaco, messages, pairs, preference, sharegpt, text
from finetune.errors import DataError

Row = Mapping[str, Any]

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
}

COLUMNS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion", "system"),
    "completion": ("prompt", "completion"),
    "sharegpt": ("conversations", "system", "tools"),
    "guanaco": ("text",),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "conversations", "system"),
    "unpaired": ("messages", "prompt", "completion", "label"),
}
"""The names that ``data.columns`` may map, by format."""

PAIRS = (
    ("question", "answer"), ("instruction", "response"), ("instruction", "answer"), ("prompt", "response"), ("query", "response"),
    ("question", "response"), ("input", "output"), ("prompt", "answer"), ("problem", "solution"),
)  # fmt: skip
"""Usual names of a prompt and its completion, tried in this order."""


def detect(rows: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """Names the format of some rows and the columns to map.

    Args:
        rows: The first rows of a file; each votes, all must agree.

    Raises:
        DataError: They look like nothing known, or like two things.
    """
    found = {_detect_one(row) for row in rows}
    if len(found) > 1:
        shapes = " and ".join(sorted(name or f"unknown ({_names(rows)})" for name, _ in found))
        raise DataError(f"data.format=auto: the first {len(rows)} rows look like {shapes}; name one with data.format=...")
    name, columns = found.pop()
    if not name:
        raise DataError(
            f"data.format=auto: no known format has the columns {_names(rows)}; name the format and its columns, "
            "e.g. data.format=prompt_completion 'data.columns={prompt: <column>, completion: <column>}'"
        )
    return name, dict(columns)


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({str(key) for row in rows for key in row})) or "(none)"


def _detect_one(row: Row) -> tuple[str, tuple[tuple[str, str], ...]]:
    has = row.keys()
    if "chosen" in has and "rejected" in has:
        return "preference", ()
    if "label" in has and isinstance(row["label"], bool) and ("messages" in has or {"prompt", "completion"} <= has):
        return "unpaired", ()
    if isinstance(row.get("messages"), list):
        return _turns("messages", row["messages"], other="messages")
    if isinstance(row.get("conversations"), list):
        return _turns("sharegpt", row["conversations"], other="conversations")
    if isinstance(row.get("conversation"), list):
        name, columns = _turns("sharegpt", row["conversation"], other="conversation")
        return name, columns or (("conversations", "conversation"),)
    if {"prompt", "completion"} <= has:
        return "prompt_completion", ()
    if {"instruction", "output"} <= has:
        return "alpaca", ()
    for prompt, completion in PAIRS:
        if {prompt, completion} <= has:
            return "prompt_completion", (("prompt", prompt), ("completion", completion))
    if isinstance(row.get("text"), str):
        return ("guanaco" if guanaco.MARKS.search(row["text"]) else "text"), ()
    return "", ()


def _turns(name: str, turns: list[Any], *, other: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """OpenAI's keys are role and content, ShareGPT's from and value; files mix the outer names with either."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if name == "messages" and "from" in first:
        return "sharegpt", (("conversations", other),)
    if name == "sharegpt" and "role" in first:
        return "messages", (("messages", other),)
    return name, ()
