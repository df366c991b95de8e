"""Compares two finished runs on the rows that both were measured on, from their folders, without loading a model."""

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
from finetune.files import read_json
from finetune.inference.bootstrap import Bootstrap, Ratio, mean_of, perplexity
from finetune.inference.rows import open_dataset
from finetune.jsonable import to_jsonable
from finetune.run import write_json

Key = tuple[str, int]
"""A row's content, and the number of earlier rows in the same run with the same content."""

Loss = tuple[float, int]
"""Nats summed over a row's trained tokens, and their number."""

CHANGED_ROWS = 10
"""Rows listed per artifact, those that changed most: a choice, few enough to read."""


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """The evaluation's results of one run.

    Attributes:
        name: Of the run.
        config: Its eval group.
        samples: Per answered row, its line of samples.jsonl.
        losses: Per artifact and row, its loss.
        general: Per artifact, the losses of ``eval.general_text``'s text, in order; empty without general text.
        references: The reference answer of each row that the loss was taken on.
    """

    name: str
    config: dict[str, Any]
    samples: dict[Key, dict[str, Any]]
    losses: dict[str, dict[Key, Loss]]
    general: dict[str, list[Loss]]
    references: dict[Key, str]


def compare(run: Path, other: Path, *, seed: int) -> dict[str, Any]:
    """Compares another run's evaluation with one run's, artifact by artifact, on the rows that both have.

    Rows are the same if their content is: prompt and reference for the metrics, token ids and labels for the loss.

    Args:
        run: Run folder; receives ``eval/compare-<other>.json``.
        other: Run folder.
        seed: Of the bootstrap.

    Returns:
        ``{"runs": [run, other], "seed", "samples", "rows": {"answers" and "loss": {"shared", "only": [run's,
        other's]}}, "artifacts": {name: {"figures": {figure: {"levels": [run's, other's], "difference", "low",
        "high"}}, "changed": [{"prompt", "reference", "answers": [...], "scores": [{figure: value}, ...]}]}},
        "remarks": [...]}``.
        Differences are the other's minus the run's, with 95 % intervals paired by row.

    Raises:
        ConfigError: Both are the same run.
        EvalError: An evaluation has not finished, or the two cannot be compared.
    """
    if run.resolve() == other.resolve():
        raise ConfigError(f"compare={other.name} is the run itself; name another run in {run.parent}")
    first, second = read(run), read(other)
    _check_settings(first, second)
    rows = {"answers": _overlap(first.samples, second.samples), "loss": _overlap(first.references, second.references)}
    if not any(overlap["shared"] for overlap in rows.values()):
        raise EvalError(
            f"compare={second.name}: it shares no held-out row with {first.name} (rows are compared by prompt, "
            "reference and token ids), so nothing can be compared; give both runs the same held-out data, system "
            "message and chat template"
        )
    samples = first.config["bootstrap_samples"]
    shared = [name for name in first.losses if name in second.losses]
    content = {
        "runs": [first.name, second.name],
        "seed": seed,
        "samples": samples,
        "rows": rows,
        "artifacts": {name: _artifact(name, first, second, samples=samples, seed=seed) for name in shared},
        "remarks": list(_remarks(first, second, rows)),
    }
    write_json(run / "eval" / f"compare-{second.name}.json", content)
    return content


def read(run: Path) -> RunResults:
    """Reads the evaluation's results from a run folder.

    Raises:
        EvalError: It has not finished, or its held-out rows are gone.
    """
    manifest = run / "eval" / "manifest.json"
    if not manifest.is_file():
        raise EvalError(
            f"{run} holds no finished evaluation; run `finetune eval run.name={run.name}` first, or name another run"
        )
    record = read_json(manifest, dict)
    lines = (run / "eval" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    answered = _numbered(json.dumps([row["prompt"], row["reference"]]) for row in samples)
    heldout = open_dataset(run / "data" / "heldout").select(range(record["product"]["loss_rows"]))
    keys = _numbered(json.dumps([row["input_ids"], row["labels"]]) for row in heldout)
    losses = {name: _losses(run / "eval", name, "losses") for name in record["product"]["artifacts"]}
    return RunResults(
        name=run.name,
        config={name.removeprefix("eval."): value for name, value in record["key"].items()},
        samples=dict(zip(answered, samples, strict=True)),
        losses={name: dict(zip(keys, values, strict=True)) for name, values in losses.items()},
        general={name: _losses(run / "eval", name, "general") for name in losses},
        references=dict(zip(keys, heldout["reference"], strict=True)),
    )


def _numbered(contents: Iterable[str]) -> list[Key]:
    """Returns the key of each row; equal contents differ by their order."""
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


def _check_settings(first: RunResults, second: RunResults) -> None:
    """Checks that both runs scored answers by the same settings.

    Raises:
        EvalError: A setting differs.
    """
    if not first.samples or not second.samples:
        return
    different = []
    for key in ("metrics", "max_new_tokens"):
        values = (run.config[key] for run in (first, second))
        ours, theirs = (sorted(value) if isinstance(value, list) else value for value in values)
        if ours != theirs:
            different.append(f"eval.{key} is {ours} in {first.name} and {theirs} in {second.name}")
    if different:
        raise EvalError(
            f"compare={second.name}: {'; '.join(different)}, so their scores do not mean the same; evaluate one of "
            f"them again with the other's setting: finetune eval run.name={second.name} eval.<setting>=..."
        )


def _overlap(ours: Iterable[Key], theirs: Iterable[Key]) -> dict[str, Any]:
    first, second = set(ours), set(theirs)
    return {"shared": len(first & second), "only": [len(first - second), len(second - first)]}


def _artifact(name: str, first: RunResults, second: RunResults, *, samples: int, seed: int) -> dict[str, Any]:
    """Returns one artifact's figures in both runs, and the rows that changed most."""
    figures: dict[str, Any] = {}
    rows = [key for key in first.references if key in second.references]
    if rows:
        bootstrap = Bootstrap(len(rows), samples=samples, seed=seed)
        before, after = (_ratio([run.losses[name][key] for key in rows]) for run in (first, second))
        figures["loss"] = _figure(bootstrap, before, after)
        figures["perplexity"] = _figure(bootstrap, before, after, shape=perplexity)
    if _same_general(first, second):
        before, after = (_ratio(run.general[name]) for run in (first, second))
        figures["general_loss"] = _figure(Bootstrap(len(before.totals), samples=samples, seed=seed), before, after)
    answered = [key for key in first.samples if key in second.samples]
    if answered:
        bootstrap = Bootstrap(len(answered), samples=samples, seed=seed)
        for metric in first.config["metrics"]:
            scores = ([run.samples[key]["scores"][name][metric] for key in answered] for run in (first, second))
            before, after = map(mean_of, scores)
            figures[metric] = _figure(bootstrap, before, after)
    changed = (
        _changed_answers(name, first, second, answered) if answered else _changed_losses(name, first, second, rows)
    )
    return {"figures": figures, "changed": changed}


def _same_general(first: RunResults, second: RunResults) -> bool:
    """Returns whether both runs have the same general text: the same file, split into pieces of the same lengths."""
    ours, theirs = ([tokens for _, tokens in next(iter(run.general.values()), [])] for run in (first, second))
    same_file = first.config.get("general_text") == second.config.get("general_text")
    return bool(ours) and ours == theirs and same_file


def _ratio(losses: list[Loss]) -> Ratio:
    totals, weights = np.array(losses, dtype=float).T
    return Ratio(totals=totals, weights=weights)


def _figure(
    bootstrap: Bootstrap, before: Ratio, after: Ratio, *, shape: Callable[[ndarray], ndarray] = np.asarray
) -> dict[str, Any]:
    levels = [float(shape(np.array([ratio.value]))[0]) for ratio in (before, after)]
    return {"levels": levels, **to_jsonable(bootstrap.difference(before, after, shape=shape))}


def _changed_answers(name: str, first: RunResults, second: RunResults, rows: list[Key]) -> list[dict[str, Any]]:
    """Returns the rows whose scores differ, sorted by the mean difference over the metrics, largest first."""
    changed = []
    for key in rows:
        ours, theirs = first.samples[key], second.samples[key]
        scores = [ours["scores"][name], theirs["scores"][name]]
        size = float(np.mean([abs(scores[1][metric] - scores[0][metric]) for metric in first.config["metrics"]]))
        if size:
            answers = [ours[name], theirs[name]]
            row = {"prompt": ours["prompt"], "reference": ours["reference"], "answers": answers, "scores": scores}
            changed.append((size, row))
    return _largest(changed)


def _changed_losses(name: str, first: RunResults, second: RunResults, rows: list[Key]) -> list[dict[str, Any]]:
    """Returns the rows sorted by the difference of their loss per token, for runs without answers."""
    changed = []
    for key in rows:
        totals = [run.losses[name][key] for run in (first, second)]
        ours, theirs = (loss / tokens if tokens else 0.0 for loss, tokens in totals)
        if ours != theirs:
            row = {
                "prompt": None,
                "reference": first.references[key],
                "answers": [None, None],
                "scores": [{"loss": ours}, {"loss": theirs}],
            }
            changed.append((abs(theirs - ours), row))
    return _largest(changed)


def _largest(changed: list[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for _, row in sorted(changed, key=lambda pair: -pair[0])[:CHANGED_ROWS]]


def _remarks(first: RunResults, second: RunResults, rows: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Yields one sentence for each part that is not compared."""
    for kind, overlap in rows.items():
        ours, theirs = overlap["only"]
        only = f"{ours} only in {first.name}"
        if overlap["shared"] and (ours or theirs):
            left_out = f"{only} and {theirs} only in {second.name} are left out"
            yield f"{kind}: {overlap['shared']} rows are in both; {left_out}"
        if not overlap["shared"]:
            why = "another tokenizer, template or data" if kind == "loss" else "other rows, or none were asked for"
            yield f"{kind}: not compared, since no row is in both ({why}): {only}, {theirs} only in {second.name}"
    if any(any(run.general.values()) for run in (first, second)) and not _same_general(first, second):
        yield "general_loss: not compared, since eval.general_text is not the same text in both"
    for run, other in ((first, second), (second, first)):
        artifacts = [name for name in run.losses if name not in other.losses]
        if artifacts:
            yield f"{', '.join(artifacts)}: measured only in {run.name}"
