"""Rows for tests, prepared by the data room as a run would."""

import json
from pathlib import Path
from typing import Any

from finetune.config import load
from finetune.data import prepare
from finetune.products import PreparedData

REQUESTS = [("Wake me at {} on Monday.", '{{"time":{}}}'), ("Book a table for {} people.", '{{"people":{}}}')]


def write_rows(file: Path, *, count: int, start: int = 0) -> Path:
    """Short user and assistant turns, each with another number."""
    lines = []
    for number in range(start, start + count):
        question, answer = REQUESTS[number % 2]
        turns = [
            {"role": "user", "content": question.format(number)},
            {"role": "assistant", "content": answer.format(number)},
        ]
        lines.append(json.dumps({"messages": turns}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def data_overrides(folder: Path, *, rows: int = 40, heldout: int = 12) -> list[str]:
    """Overrides that take the rows of a folder instead of the quickstart's."""
    train = write_rows(folder / "train.jsonl", count=rows)
    held = write_rows(folder / "heldout.jsonl", count=heldout, start=1000)
    return [
        f"data.path={train}",
        f"data.heldout_path={held}",
        "data.max_tokens=128",
        "data.pack_tokens=128",
        "data.cache=''",
    ]


def prepared_rows(folder: Path, tokenizer: Any) -> PreparedData:
    """A few packed training rows and a few held-out ones."""
    config = load(["+experiment=quickstart", *data_overrides(folder)])
    target = folder / "data"
    target.mkdir()
    return prepare(config.data, folder=target, tokenizer=tokenizer, seed=1)
