"""Known shapes of rows. A new format is one file here and one line in each table."""

import re
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
    "preference": ("prompt", "chosen", "rejected", "conversations", "system", "tools"),
    "unpaired": ("messages", "conversations", "prompt", "completion", "label", "system", "tools"),
}
"""The names that ``data.columns`` may map, by format."""

PAIRS = (
    ("question", "answer"), ("instruction", "response"), ("instruction", "answer"), ("prompt", "response"), ("query", "response"),
    ("question", "response"), ("input", "output"), ("input", "target"), ("prompt", "answer"), ("problem", "solution"),
)  # fmt: skip
"""Usual names of a prompt and its completion, tried in this order."""

EXTRAS = ("input", "context")
"""What a prompt is about, beside it: alpaca's ``input``."""

LABELS = (
    "label",
    "labels",
    "category",
    "class",
    "intent",
    "target",
    "sentiment",
    "answer",
    "response",
    "output",
    "completion",
    "summary",
)
"""Beside a ``text`` these may be what is to be learnt, so that reading the text alone would be a guess."""

CHATS = re.compile(
    r"\[INST\]|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant)\|>|### (?:Instruction|Response):"
)
"""A chat that somebody has written out already: as raw text its questions would be learnt too."""


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
        raise DataError(
            f"data.format=auto: the first {len(rows)} rows look like {shapes}; name one with data.format=..."
        )
    name, columns = found.pop()
    if name == "text":
        _refuse_a_guess(rows)
    if not name:
        raise DataError(
            f"data.format=auto: no known format has the columns {_names(rows)}; name the format and its columns, "
            "e.g. data.format=prompt_completion 'data.columns={prompt: <column>, completion: <column>}'"
        )
    return _beside(rows, name, dict(columns))


def unread(rows: Sequence[Row], name: str, columns: Mapping[str, str]) -> list[str]:
    """Columns of some rows that a format does not look at, in the file's order: a wrong guess shows here first."""
    read = {columns.get(ours, ours) for ours in (*COLUMNS[name], "tests")}
    return [str(column) for column in dict.fromkeys(column for row in rows for column in row) if column not in read]


def _refuse_a_guess(rows: Sequence[Row]) -> None:
    label = next((name for name in LABELS if all(name in row for row in rows)), None)
    if label:
        raise DataError(
            f"data.format=auto: beside 'text' stands {label!r}, so either the text alone is learnt (data.format=text) or {label!r} is the "
            f"answer to it (data.format=prompt_completion 'data.columns={{prompt: text, completion: {label}}}'); say which"
        )
    if all(CHATS.search(row["text"]) for row in rows):
        mark = next(match.group() for row in rows if (match := CHATS.search(row["text"])))
        raise DataError(
            f"data.format=auto: the texts hold chats that are written out already ({mark}), and as raw text their questions would be "
            "learnt too; write the turns as messages, or say data.format=text to learn all of it"
        )


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({str(key) for row in rows for key in row})) or "(none)"


def _detect_one(row: Row) -> tuple[str, tuple[tuple[str, str], ...]]:
    has = row.keys()
    if "chosen" in has and "rejected" in has:
        return "preference", ()
    if (
        "label" in has
        and isinstance(row["label"], bool)
        and (has & {"messages", "conversations"} or {"prompt", "completion"} <= has)
    ):
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


def _beside(rows: Sequence[Row], name: str, columns: dict[str, str]) -> tuple[str, dict[str, str]]:
    """What some of the rows have besides: the matter of a prompt, a system message, a preference's prompt under another name."""
    has = {column for row in rows for column in row}
    extra = next(
        (column for column in EXTRAS if all(isinstance(row.get(column), str | None) for row in rows) and column in has),
        None,
    )
    if name == "prompt_completion" and columns and extra and extra != columns["prompt"]:
        theirs = {"instruction": columns["prompt"], "input": extra, "output": columns["completion"]}
        name, columns = "alpaca", {ours: column for ours, column in theirs.items() if ours != column}
    asked = next((column for column, _ in PAIRS if column in has), None)
    if name == "preference" and asked and not has & {"prompt", "conversations"}:
        columns = {"prompt": asked}
    if "system" in COLUMNS[name] and "system_prompt" in has and "system" not in has:
        columns = {**columns, "system": "system_prompt"}
    return name, columns


def _turns(name: str, turns: list[Any], *, other: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """OpenAI's keys are role and content, ShareGPT's from and value; files mix the outer names with either."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if name == "messages" and "from" in first:
        return "sharegpt", (("conversations", other),)
    if name == "sharegpt" and "role" in first:
        return "messages", (("messages", other),)
    return name, ()
