"""Writes the rows of a walk: the quickstart's requests in the format that a recipe reads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.paths import SHIPPED


def write_rows(folder: Path, name: str, *, training: int, heldout: int) -> list[str]:
    """Writes training and held-out rows in a data format; returns the overrides that read them.

    Raises:
        ConfigError: The format is not known here.
    """
    overrides = ["data.hub=null", "data.cache=''"]
    for setting, file, count in (("path", "train", training), ("heldout_path", "heldout", heldout)):
        lines = (SHIPPED / "quickstart" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[: count + 1]
        requests = [{turn["role"]: turn["content"] for turn in json.loads(line)["messages"]} for line in lines]
        rows = [_row(name, request, other=after) for request, after in itertools.pairwise(requests)]
        path = folder / f"{file}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        overrides.append(f"data.{setting}={path}")
    return overrides


def _row(name: str, request: dict[str, str], *, other: dict[str, str]) -> dict[str, Any]:
    question, answer = request["user"], request["assistant"]
    if name == "alpaca":
        return {"instruction": question, "input": "", "output": answer}
    if name == "guanaco":
        return {"text": f"### Human: {question}### Assistant: {answer}"}
    if name == "messages":
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    if name == "preference":
        return {"prompt": question, "chosen": answer, "rejected": other["assistant"] + "."}
    raise ConfigError(f"benchmarks.walk: no rows are known for data.format={name}")
