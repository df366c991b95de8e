"""Two finished runs on the rows that both were measured on: read from their folders, no model is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from finetune.errors import ConfigError, EvalError
from finetune.inference.bootstrap import Bootstrap, Ratio, mean_of, perplexity
from finetune.inference.rows import open_dataset
from finetune.run import write_json

Key = tuple[str, int]
"""What a row says, and how many rows before it in the same run say the same."""

Loss = tuple[float, int]
"""Nats summed over a row's trained tokens, and how many those are."""

CHANGED_ROWS = 10
"""Rows that are listed per artifact, those that changed most: a choice, as many as are read."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run's evaluation left.

    Attributes:
        name: The run's.
        config: Its eval group.
        samples: Per row that answers were written for, its line of samples.jsonl.
        losses: Per artifact and row, its loss.
        general: Per artifact, the losses of ``eval.forgetting``'s text, in its order; empty where none was named.
        references: The right answer of each row that the loss was taken on.
    """

    name: str
    config: dict[str, Any]
    samples: dict[Key, dict[str, Any]]
    losses: dict[str, dict[Key, Loss]]
    general: dict[str, list[Loss]]
    references: dict[Key, str]


def compare(run: Path, other: Path, *, seed: int) -> dict[str, Any]:
    """Holds another run's evaluation against one run's, artifact by artifact, on the rows that both have.

    Rows are the same when they say the same: prompt and right answer for the metrics, token ids and labels for the loss.

    Args:
        run: Run folder; gets ``eval/compare-<other>.json``.
        other: Run folder.
        seed: Of the bootstrap.

    Returns:
        ``{"runs": [run, other], "seed", "samples", "rows": {"answers" and "loss": {"shared", "only": [run's, other's]}},
        "artifacts": {name: {"figures": {figure: {"levels": [run's, other's], "difference", "low", "high"}},
        "changed": [{"prompt", "reference", "answers": [...], "scores": [{figure: value}, ...]}]}}, "remarks": [...]}``.
        Differences are the other's minus the run's, with 95 % intervals paired by row.

    Raises:
        ConfigError: Both are the same run.
        EvalError: An evaluation has not finished, or the two cannot be compared.
    """
    if run.resolve() == other.resolve():
        raise ConfigError(f"compare={other.name} is the run itself; name another run in {run.parent}")
    one, two = read(run), read(other)
    _check_settings(one, two)
    rows = {"answers": _overlap(one.samples, two.samples), "loss": _overlap(one.references, two.references)}
    if not any(found["shared"] for found in rows.values()):
        raise EvalError(
            f"compare={two.name}: no held-out row of it says the same as one of {one.name} (rows are told apart by prompt, right answer "
            "and token ids), so nothing can be compared; give both runs the same held-out data, system message and chat template"
        )
    artifacts = [name for name in one.losses if name in two.losses]
    content = {
        "runs": [one.name, two.name],
        "seed": seed,
        "samples": one.config["bootstrap_samples"],
        "rows": rows,
        "artifacts": {
            name: _artifact(name, one, two, samples=one.config["bootstrap_samples"], seed=seed) for name in artifacts
        },
        "remarks": list(_remarks(one, two, rows)),
    }
    write_json(run / "eval" / f"compare-{two.name}.json", content)
    return content


def read(run: Path) -> Measured:
    """Reads what an evaluation left in a run folder.

    Raises:
        EvalError: It has not finished, or its held-out rows are gone.
    """
    manifest = run / "eval" / "manifest.json"
    if not manifest.is_file():
        raise EvalError(
            f"{run} holds no finished evaluation; run `finetune eval run.name={run.name}` first, or name another run"
        )
    made = json.loads(manifest.read_text(encoding="utf-8"))
    lines = (run / "eval" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    heldout = open_dataset(run / "data" / "heldout").select(range(made["product"]["loss_rows"]))
    keys = _numbered(json.dumps([row["input_ids"], row["labels"]]) for row in heldout)
    return Measured(
        name=run.name,
        config={name.removeprefix("eval."): value for name, value in made["key"].items()},
        samples=dict(
            zip(_numbered(json.dumps([row["prompt"], row["reference"]]) for row in samples), samples, strict=True)
        ),
        losses={
            name: dict(zip(keys, _losses(run / "eval", name, "losses"), strict=True))
            for name in made["product"]["artifacts"]
        },
        general={name: _losses(run / "eval", name, "general") for name in made["product"]["artifacts"]},
        references=dict(zip(keys, heldout["reference"], strict=True)),
    )


def _numbered(contents: Iterable[str]) -> list[Key]:
    """Rows that say the same are told apart by their order."""
    seen: Counter[str] = Counter()
    keys = []
    for content in contents:
        keys.append((content, seen[content]))
        seen[content] += 1
    return keys


def _losses(folder: Path, artifact: str, kind: str) -> list[Loss]:
    file = folder / f"{artifact}.rows.jsonl"
    if not file.is_file():  # an unquantized base is measured once
        file = folder / "base.rows.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(loss, tokens) for line in lines for loss, tokens, _ in line.get(kind, [])]


def _check_settings(one: Measured, two: Measured) -> None:
    """What answers were judged by must be the same.

    Raises:
        EvalError: A setting differs.
    """
    if not one.samples or not two.samples:
        return
    settings = {key: [sorted(value) if isinstance(value := run.config[key], list) else value for run in (one, two)]
                for key in ("metrics", "max_new_tokens")}  # fmt: skip
    different = [
        f"eval.{key} is {ours} in {one.name} and {theirs} in {two.name}"
        for key, (ours, theirs) in settings.items()
        if ours != theirs
    ]
    if different:
        raise EvalError(
            f"compare={two.name}: {'; '.join(different)}, so their scores do not mean the same; evaluate one of them again with the "
            f"other's setting: finetune eval run.name={two.name} eval.<setting>=..."
        )


def _overlap(ours: Iterable[Key], theirs: Iterable[Key]) -> dict[str, Any]:
    one, two = set(ours), set(theirs)
    return {"shared": len(one & two), "only": [len(one - two), len(two - one)]}


def _artifact(name: str, one: Measured, two: Measured, *, samples: int, seed: int) -> dict[str, Any]:
    """One artifact's figures in both runs, and the rows that changed most."""
    figures: dict[str, Any] = {}
    rows = [key for key in one.references if key in two.references]
    if rows:
        draw = Bootstrap(len(rows), samples=samples, seed=seed)
        before, after = (_ratio([run.losses[name][key] for key in rows]) for run in (one, two))
        figures["loss"] = _figure(draw, before, after)
        figures["perplexity"] = _figure(draw, before, after, shape=perplexity)
    if _same_general(one, two):
        before, after = (_ratio(run.general[name]) for run in (one, two))
        figures["general_loss"] = _figure(Bootstrap(len(before.totals), samples=samples, seed=seed), before, after)
    asked = [key for key in one.samples if key in two.samples]
    if asked:
        draw = Bootstrap(len(asked), samples=samples, seed=seed)
        for metric in one.config["metrics"]:
            before, after = (mean_of([run.samples[key]["scores"][name][metric] for key in asked]) for run in (one, two))
            figures[metric] = _figure(draw, before, after)
    changed = _changed_answers(name, one, two, asked) if asked else _changed_losses(name, one, two, rows)
    return {"figures": figures, "changed": changed}


def _same_general(one: Measured, two: Measured) -> bool:
    """Whether both were measured on the same general text: the same file, giving pieces of the same lengths."""
    lengths = [[tokens for _, tokens in next(iter(run.general.values()), [])] for run in (one, two)]
    return (
        bool(lengths[0]) and lengths[0] == lengths[1] and one.config.get("forgetting") == two.config.get("forgetting")
    )


def _ratio(losses: list[Loss]) -> Ratio:
    totals, weights = np.array(losses, dtype=float).T
    return Ratio(totals=totals, weights=weights)


def _figure(
    draw: Bootstrap, before: Ratio, after: Ratio, *, shape: Callable[[ndarray], ndarray] = np.asarray
) -> dict[str, Any]:
    found = draw.difference(before, after, shape=shape)
    levels = [float(shape(np.array([level.value]))[0]) for level in (before, after)]
    return {"levels": levels, "difference": found.value, "low": found.low, "high": found.high}


def _changed_answers(name: str, one: Measured, two: Measured, rows: list[Key]) -> list[dict[str, Any]]:
    """Rows whose scores differ, by the mean difference over the metrics, largest first."""
    found = []
    for key in rows:
        ours, theirs = one.samples[key], two.samples[key]
        scores = [ours["scores"][name], theirs["scores"][name]]
        size = float(np.mean([abs(scores[1][metric] - scores[0][metric]) for metric in one.config["metrics"]]))
        if size:
            row = {
                "prompt": ours["prompt"],
                "reference": ours["reference"],
                "answers": [ours[name], theirs[name]],
                "scores": scores,
            }
            found.append((size, row))
    return _largest(found)


def _changed_losses(name: str, one: Measured, two: Measured, rows: list[Key]) -> list[dict[str, Any]]:
    """Where no answers were written: rows by the difference of their loss per token."""
    found = []
    for key in rows:
        totals = [run.losses[name][key] for run in (one, two)]
        ours, theirs = (loss / tokens if tokens else 0.0 for loss, tokens in totals)
        if ours != theirs:
            row = {
                "prompt": None,
                "reference": one.references[key],
                "answers": [None, None],
                "scores": [{"loss": ours}, {"loss": theirs}],
            }
            found.append((abs(theirs - ours), row))
    return _largest(found)


def _largest(found: list[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for _, row in sorted(found, key=lambda pair: -pair[0])[:CHANGED_ROWS]]


def _remarks(one: Measured, two: Measured, rows: dict[str, dict[str, Any]]) -> Iterable[str]:
    """What was left out, and why."""
    for what, overlap in rows.items():
        ours, theirs = overlap["only"]
        if overlap["shared"] and (ours or theirs):
            yield f"{what}: {overlap['shared']} rows are in both; {ours} only in {one.name} and {theirs} only in {two.name} are left out"
        if not overlap["shared"]:
            why = "another tokenizer, template or data" if what == "loss" else "other rows, or none were asked for"
            yield f"{what}: not compared, since no row is in both ({why}): {ours} only in {one.name}, {theirs} only in {two.name}"
    if any(any(run.general.values()) for run in (one, two)) and not _same_general(one, two):
        yield "general_loss: not compared, since eval.forgetting is not the same text in both"
    alone = {
        run.name: [name for name in run.losses if name not in other.losses] for run, other in ((one, two), (two, one))
    }
    for name, artifacts in alone.items():
        if artifacts:
            yield f"{', '.join(artifacts)}: measured only in {name}"
