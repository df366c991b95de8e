"""Detects the format of rows from their columns."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.formats.guanaco import MARKS
from finetune.data.formats.tables import COLUMNS, ColumnMapping, Row
from finetune.errors import DataError

PROMPT_COLUMNS = (
    *(("question", "answer"), ("instruction", "response"), ("instruction", "answer"), ("prompt", "response")),
    *(("query", "response"), ("question", "response"), ("input", "output"), ("input", "target")),
    *(("prompt", "answer"), ("problem", "solution")),
)
"""Usual names of a prompt and its completion, tried in this order."""

CONTEXT_COLUMNS = ("input", "context")
"""Usual names of the text that a prompt is about; alpaca's ``input``."""

LABEL_COLUMNS = (
    *("label", "labels", "category", "class", "intent", "target", "sentiment"),
    *("answer", "response", "output", "completion", "summary"),
)
"""Next to a ``text`` these may be the answer, so that training on the text alone would be a guess."""

CHATS = re.compile(
    r"\[INST\]|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant)\|>"
    r"|### (?:Instruction|Response):"
)
"""Marks of a rendered chat. As raw text, its questions would be trained on too."""


def detect(rows: Sequence[Row]) -> tuple[str, ColumnMapping]:
    """Returns the name of the rows' format and the columns to map.

    Args:
        rows: The first rows of a file; all that have a known format must have the same one.

    Raises:
        DataError: The format is unknown or ambiguous.
    """
    known = [row for row in rows if _detect_row(row)[0]]
    rows = known or rows  # a few bad rows at the top are judged row by row later
    shapes = {_detect_row(row) for row in rows}
    if len(shapes) > 1:
        names = " and ".join(sorted(name for name, _ in shapes))
        raise DataError(
            f"data.format=auto: the first {len(rows)} rows look like {names}; name one with data.format=..."
        )
    name, columns = shapes.pop()
    if name == "text":
        _check_raw_text(rows)
    if not name:
        raise DataError(
            f"data.format=auto: no known format has the columns {_column_names(rows)}; "
            "name the format and its columns, e.g. data.format=prompt_completion "
            "'data.columns={prompt: <column>, completion: <column>}'"
        )
    return _with_extra_columns(rows, name, dict(columns))


def unused_columns(rows: Sequence[Row], name: str, columns: Mapping[str, str]) -> list[str]:
    """Returns the columns that a format does not read, in the file's order. They reveal a wrong format early."""
    read = {columns.get(column, column) for column in (*COLUMNS[name], "tests")}
    return [str(column) for column in dict.fromkeys(column for row in rows for column in row) if column not in read]


def _check_raw_text(rows: Sequence[Row]) -> None:
    label = next((name for name in LABEL_COLUMNS if all(name in row for row in rows)), None)
    if label:
        raise DataError(
            f"data.format=auto: there is a column {label!r} next to 'text'. To train on the text alone, set "
            f"data.format=text; if {label!r} is the answer to it, set "
            f"data.format=prompt_completion 'data.columns={{prompt: text, completion: {label}}}'"
        )
    if all(CHATS.search(row["text"]) for row in rows):
        mark = next(match.group() for row in rows if (match := CHATS.search(row["text"])))
        raise DataError(
            f"data.format=auto: the texts contain rendered chats ({mark}), and as raw text their questions would be "
            "trained on too; write the turns as messages, or set data.format=text to train on all of it"
        )


def _column_names(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({str(key) for row in rows for key in row})) or "(none)"


def _detect_row(row: Row) -> tuple[str, tuple[tuple[str, str], ...]]:
    columns = row.keys()
    if {"chosen", "rejected"} <= columns:
        return "preference", ()
    answered = columns & {"messages", "conversations"} or {"prompt", "completion"} <= columns
    if answered and isinstance(row.get("label"), bool):
        return "unpaired", ()
    if isinstance(row.get("messages"), list | dict):
        return _detect_turns("messages", row["messages"], column="messages")
    if isinstance(row.get("conversations"), list | dict):
        return _detect_turns("sharegpt", row["conversations"], column="conversations")
    if isinstance(row.get("conversation"), list | dict):
        name, mapping = _detect_turns("sharegpt", row["conversation"], column="conversation")
        return name, mapping or (("conversations", "conversation"),)
    if {"prompt", "completion"} <= columns:
        return "prompt_completion", ()
    if "prompt" in columns and columns & {"reference", "tests"}:
        return "prompt", ()
    if {"instruction", "output"} <= columns:
        return "alpaca", ()
    for prompt, completion in PROMPT_COLUMNS:
        if {prompt, completion} <= columns:
            return "prompt_completion", (("prompt", prompt), ("completion", completion))
    if isinstance(row.get("text"), str):
        return ("guanaco" if MARKS.search(row["text"]) else "text"), ()
    return "", ()


def _detect_turns(
    name: str, turns: list[Any] | dict[str, Any], *, column: str
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Decides by the keys of a turn, since files combine either column name with either kind of turns.

    OpenAI's keys are role and content, ShareGPT's are from and value.
    """
    first = turns if isinstance(turns, dict) else turns[0] if turns and isinstance(turns[0], dict) else {}
    if name == "messages" and "from" in first:
        return "sharegpt", (("conversations", column),)
    if name == "sharegpt" and "role" in first:
        return "messages", (("messages", column),)
    return name, ()


def _with_extra_columns(rows: Sequence[Row], name: str, columns: ColumnMapping) -> tuple[str, ColumnMapping]:
    """Maps optional columns: the context of a prompt, a system message, a preference's prompt under another name."""
    existing = {column for row in rows for column in row}
    texts = (column for column in CONTEXT_COLUMNS if all(isinstance(row.get(column), str | None) for row in rows))
    context = next((column for column in texts if column in existing), None)
    if name == "prompt_completion" and columns and context and context != columns["prompt"]:
        mapping = {"instruction": columns["prompt"], "input": context, "output": columns["completion"]}
        name, columns = "alpaca", {column: actual for column, actual in mapping.items() if column != actual}
    prompt = next((column for column, _ in PROMPT_COLUMNS if column in existing), None)
    if name == "preference" and prompt and not existing & {"prompt", "conversations"}:
        columns = {"prompt": prompt}
    if "system" in COLUMNS[name] and "system_prompt" in existing and "system" not in existing:
        columns = {**columns, "system": "system_prompt"}
    return name, columns
