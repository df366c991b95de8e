"""General text beside the task: what a model could say before, and should still be able to say after it was tuned."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import EvalError
from finetune.inference.rows import Row


def general_rows(file: Path, tokenizer: Any, *, longest: int) -> list[Row]:
    """The documents of a file as rows of which every token but the first is measured.

    Args:
        file: ``.jsonl`` with ``text`` or ``messages`` in each row; anything else is text with blank lines between documents.
        tokenizer: The base's. Messages go through its chat template.
        longest: Tokens of a row at most; a longer document becomes several.

    Raises:
        EvalError: The file holds no document, or a row is none.
    """
    rows: list[Row] = []
    for text in _rendered(file, tokenizer) if file.suffix == ".jsonl" else _paragraphs(file):
        ids = text if isinstance(text, list) else tokenizer(text)["input_ids"]
        rows += [
            {"input_ids": ids[start : start + longest], "labels": ids[start : start + longest]}
            for start in range(0, len(ids), longest)
        ]
    if not any(len(row["input_ids"]) > 1 for row in rows):
        raise EvalError(f"eval.forgetting: {file} holds no text; give a file of general text, or null")
    return rows


def _paragraphs(file: Path) -> Iterator[str]:
    for paragraph in file.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n\n"):
        if paragraph.strip():
            yield paragraph.strip()


def _rendered(file: Path, tokenizer: Any) -> Iterator[str | list[int]]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise EvalError(f"eval.forgetting: {file}, line {number} is not JSON: {error}") from error
            if isinstance(row, dict) and isinstance(row.get("text"), str):
                yield row["text"]
            elif isinstance(row, dict) and isinstance(row.get("messages"), list):
                yield tokenizer.apply_chat_template(row["messages"], return_dict=False)
            else:
                raise EvalError(
                    f"eval.forgetting: {file}, line {number} has neither text nor messages; give one of them in each row"
                )
