"""Reads general text, whose loss shows what the model forgot by being tuned on the task."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import EvalError
from finetune.inference.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def general_rows(file: Path, tokenizer: "PreTrainedTokenizerBase", *, longest: int) -> list[Row]:
    """Returns the documents of a file as rows; the loss is taken on every token but the first.

    Args:
        file: ``.jsonl`` with ``text`` or ``messages`` in each row; anything else is text with blank lines between
            documents.
        tokenizer: The base's. Messages go through its chat template.
        longest: Maximum tokens of a row; a longer document becomes several rows.

    Raises:
        EvalError: The file holds no document, or a row is neither text nor messages.
    """
    rows: list[Row] = []
    for text in _rendered(file, tokenizer) if file.suffix == ".jsonl" else _paragraphs(file):
        ids = text if isinstance(text, list) else tokenizer(text)["input_ids"]
        pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        rows += [{"input_ids": piece, "labels": piece} for piece in pieces]
    if not any(len(row["input_ids"]) > 1 for row in rows):
        raise EvalError(f"eval.general_text: {file} holds no text; give a file of general text, or null")
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
                raise EvalError(f"eval.general_text: {file}, line {number} is not JSON: {error}") from error
            if isinstance(row, dict) and isinstance(row.get("text"), str):
                yield row["text"]
            elif isinstance(row, dict) and isinstance(row.get("messages"), list):
                yield tokenizer.apply_chat_template(row["messages"], return_dict=False)
            else:
                raise EvalError(
                    f"eval.general_text: {file}, line {number} has neither text nor messages; "
                    "give one of them in each row"
                )
