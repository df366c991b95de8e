"""Rows of a task: prepared by the data stage once, then read and answered by every model and scored by one metric."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.model import ModelSpec
    from finetune.scores import Difference

BATCH_ROWS = 16
BATCH_TOKENS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Held-out rows that models are scored on.

    Attributes:
        data: The data stage's folder, with a held-out split.
        metric: One of `finetune.eval.metrics.METRICS`; empty for the loss alone.
        max_new_tokens: Longest answer.
    """

    data: Path
    metric: str
    max_new_tokens: int


def check_metric(metric: str, *, where: str) -> None:
    """Checks that a metric exists.

    Raises:
        ConfigError: There is no such metric.
    """
    from finetune.eval.metrics import METRICS

    if metric and metric not in METRICS:
        raise ConfigError(f"{where}: metric must be one of {', '.join(sorted(METRICS))}; got {metric}")


def split_rows(source: Path, folder: Path, *, train: int | None, heldout: int, where: str) -> list[str]:
    """Writes a file's first rows to train on and the next to measure on; returns the overrides that name them.

    Args:
        source: JSON Lines.
        folder: For the two files.
        train: Rows to train on; None takes all but the last ``heldout``.
        heldout: Rows to measure on.
        where: For messages.

    Raises:
        ConfigError: The file is missing or too short.
    """
    if not source.is_file():
        raise ConfigError(f"{where}={source} is not a file; give JSON Lines in any format that data.path takes")
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    train = max(1, len(lines) - heldout) if train is None else train
    if len(lines) < train + heldout:
        raise ConfigError(
            f"{where}: {source} has {len(lines)} rows and {train + heldout} are needed; lower rows or heldout"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", lines[:train]), ("heldout", lines[train : train + heldout])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    return ["data=custom", f"data.path={folder / 'train.jsonl'}", f"data.heldout_path={folder / 'heldout.jsonl'}"]


def run_pipeline(overrides: Sequence[str], *, root: Path, name: str) -> tuple[float, int]:
    """Runs the pipeline in a fresh process; returns seconds and peak resident memory of all of it."""
    from finetune.bench.speed import run_timed

    run = [f"run.root={root}", f"run.name={name}", "run.if_exists=overwrite", "tracking=[]", "preflight=off"]
    return run_timed(name, [sys.executable, "-m", "finetune", "+experiment=quickstart", *overrides, *run], root, {})


def model_overrides(model: str) -> list[str]:
    """Returns overrides that select a model: an option of the model group, or a value of ``model.name``."""
    from finetune.paths import CONF

    is_option = (CONF / "model" / f"{model}.yaml").is_file() and not model.startswith("_")
    return [f"model={model}"] if is_option else ["model=custom", f"model.name={json.dumps(model)}"]


def losses(model: Any, rows: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """Returns for each row the nats summed over its trained tokens, and their number."""
    from finetune.inference.losses import row_losses

    return [(row.loss, row.tokens) for row in row_losses(model, rows, batch_tokens=BATCH_TOKENS)]


def scores(model: Any, spec: ModelSpec, task: Task, rows: list[dict[str, Any]]) -> list[float]:
    """Scores the greedy answer to each row; empty without a metric."""
    from finetune.inference.chat import load_chat
    from finetune.inference.generation import generate

    if not task.metric:
        return []
    chat = load_chat(spec, task.data)
    prompts = [row["prompt_ids"] for row in rows]
    answers = generate(
        model, chat.tokenizer, prompts, max_new_tokens=task.max_new_tokens, batch_rows=BATCH_ROWS, ends=chat.ends
    )
    return score_answers([answer.tokens for answer in answers], chat.tokenizer, task, rows)


def score_answers(answers: list[list[int]], tokenizer: Any, task: Task, rows: list[dict[str, Any]]) -> list[float]:
    """Scores an answer to each row, given as token ids, by the task's metric."""
    from finetune.eval.metrics import METRICS, prepare_rows

    prepare_rows(rows, [task.metric], task.data / "heldout")
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return [METRICS[task.metric](text, row) for text, row in zip(texts, rows, strict=True)]


def change_figures(change: Difference) -> dict[str, float]:
    """Rounds a difference for the tables' JSON."""
    return {"difference": round(change.difference, 4), "low": round(change.low, 4), "high": round(change.high, 4)}
