"""Checks that prompts, rewards and model fit together: after the data are prepared, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from finetune.objectives import OBJECTIVES
from finetune.rewards import column_of

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.products import PreparedData


def prompt_problems(config: RunConfig, data: PreparedData, *, positions: int | None) -> Iterator[str]:
    """Yields why the answers to the prepared prompts could not be sampled or judged.

    Args:
        config: The whole configuration.
        data: Rows of ``data.objective=prompt``; others have no problem.
        positions: Of the model; None where it does not say.
    """
    if not OBJECTIVES[config.train.objective].samples:
        return
    splits = _splits(data)
    for split, rows in splits.items():
        names = {f"train.grpo.rewards: {name}": column_of(name) for name in config.train.grpo.rewards}
        if split == "heldout" and config.eval.rows:
            names |= {f"eval.metrics: {name}": column_of(name) for name in config.eval.metrics}
        for where, column in names.items():
            yield from _lacking(rows, split, column, where=where)
    limit = config.train.grpo.max_new_tokens
    longest = max((len(ids) for rows in splits.values() for ids in rows["prompt_ids"]), default=0)
    if positions is not None and longest + limit > positions:
        yield (
            f"train.grpo.max_new_tokens: the longest prompt has {longest:,} tokens, and with {limit:,} new ones an "
            f"answer would end beyond the model's {positions:,} positions; set it to at most {positions - longest}, or "
            "lower data.max_tokens"
        )


def _lacking(rows: Any, split: str, column: str, *, where: str) -> Iterator[str]:
    if not column:
        return
    values = rows[column] if column in rows.column_names else [None] * len(rows)
    lacking = [number for number, value in zip(rows["row"], values, strict=True) if not (value or "").strip()]
    if lacking:
        yield (
            f"{where} reads the {column} of a row, and {len(lacking):,} of {len(rows):,} rows in {split} have none "
            f"(the first is row {lacking[0]}); add a column {column!r} to the data, or leave it out"
        )


def _splits(data: PreparedData) -> Mapping[str, Any]:
    from datasets import load_from_disk

    names = ["train", *(["heldout"] if data.heldout_rows else [])]
    return {name: load_from_disk(str(data.folder / name)) for name in names}
