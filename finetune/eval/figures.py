"""From what was recorded row by row to figures with intervals, and to the samples that a reader can look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from finetune.eval.config import ARTIFACTS, CHANGES, LOWER_IS_BETTER, EvalConfig
from finetune.eval.metrics import METRICS, repetition
from finetune.eval.records import Record
from finetune.measure.bootstrap import Bootstrap, Interval, Ratio, mean_of
from finetune.measure.losses import RowLoss
from finetune.measure.rows import Row

LARGEST_EXPONENT = 700.0
"""exp of more overflows a float64."""


def perplexity(loss: ndarray) -> ndarray:
    return np.exp(np.minimum(loss, LARGEST_EXPONENT))


@dataclass(frozen=True, slots=True)
class Table:
    """All artifacts' figures on the same rows.

    Attributes:
        losses: Per artifact, the loss of a token.
        general: Per artifact, that of a token of general text; empty where none was given.
        answers: Per artifact and figure, the mean over answers.
        texts: Per artifact, its answers as text.
    """

    losses: dict[str, Ratio]
    general: dict[str, Ratio]
    answers: dict[str, dict[str, Ratio]]
    texts: dict[str, list[str]]


def tabulate(records: dict[str, Record], *, rows: Sequence[Row], metrics: list[str], decode: Callable[[list[int]], str]) -> Table:
    """Scores every answer.

    Args:
        records: By artifact.
        rows: Those that answers were written for, with what the metrics ask of them.
        metrics: Names in `METRICS`.
        decode: Token ids to text, without special tokens.
    """
    losses = {name: _loss(record.losses) for name, record in records.items()}
    general = {name: _loss(record.general) for name, record in records.items() if record.general}
    texts = {name: [decode(record.answers[number].tokens) for number in range(len(rows))] for name, record in records.items()}
    answers = {}
    for name, record in records.items():
        written = [record.answers[number] for number in range(len(rows))]
        scored = {metric: [METRICS[metric](text, row) for text, row in zip(texts[name], rows, strict=True)] for metric in metrics}
        scored["stop_rate"] = [float(answer.stopped) for answer in written]
        scored["mean_tokens"] = [float(len(answer.tokens)) for answer in written]
        scored["repetition"] = [repetition(answer.tokens) for answer in written]
        answers[name] = {figure: mean_of(values) for figure, values in scored.items()} if rows else {}
    return Table(losses=losses, general=general, answers=answers, texts=texts)


def _loss(losses: list[RowLoss]) -> Ratio:
    totals = np.array([row.loss for row in losses], dtype=float)
    return Ratio(totals=totals, weights=np.array([row.tokens for row in losses], dtype=float))


def levels(table: Table, records: dict[str, Record], *, config: EvalConfig, seed: int) -> dict[str, dict[str, Any]]:
    """Each artifact's figures: ``loss``, ``perplexity``, ``tokens``, ``token_accuracy``, ``metrics`` with intervals, ..."""
    found: dict[str, dict[str, Any]] = {}
    for name in ARTIFACTS:
        losses = records[name].losses
        loss, tokens = _draw(table.losses[name], config, seed).level(table.losses[name]), sum(row.tokens for row in losses)
        entry: dict[str, Any] = {
            "loss": loss.value, "loss_low": loss.low, "loss_high": loss.high, "tokens": tokens,
            "perplexity": float(perplexity(np.array([loss.value]))[0]),
            "token_accuracy": sum(row.correct for row in losses) / max(tokens, 1), "metrics": {},
        }  # fmt: skip
        if table.general:
            entry["general_loss"] = _level(_draw(table.general[name], config, seed).level(table.general[name]))
        for figure, ratio in table.answers[name].items():
            if figure in config.metrics:
                entry["metrics"][figure] = _level(_draw(ratio, config, seed).level(ratio))
            else:
                entry[figure] = ratio.value
        found[name] = entry
    return found


def changes(table: Table, *, config: EvalConfig, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """What quantization cost, what tuning gained, what the merge cost, and all together, each paired by row."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for change, (before, after) in CHANGES.items():
        one, other = table.losses[before], table.losses[after]
        draw = _draw(one, config, seed)
        found[change] = {
            "loss": _difference(draw.difference(one, other)),
            "perplexity": _difference(draw.difference(one, other, shape=perplexity)),
        }
        if table.general:
            one, other = table.general[before], table.general[after]
            found[change]["general_loss"] = _difference(_draw(one, config, seed).difference(one, other))
        for figure, ratio in table.answers[before].items():
            found[change][figure] = _difference(_draw(ratio, config, seed).difference(ratio, table.answers[after][figure]))
    return found


def _draw(figure: Ratio, config: EvalConfig, seed: int) -> Bootstrap:
    return Bootstrap(len(figure.totals), samples=config.bootstrap_samples, seed=seed)


def missed_gates(
    gate: dict[str, float], artifacts: dict[str, dict[str, Any]], changed: dict[str, dict[str, dict[str, float]]]
) -> list[str]:
    """One sentence for each threshold that was not met."""
    missed = []
    for key, bound in gate.items():
        subject, _, figure = key.partition(".")
        value = changed[subject][figure]["difference"] if subject in changed else _figure(artifacts[subject], figure)
        met = value <= bound if figure in LOWER_IS_BETTER else value >= bound
        if not met:
            wanted = "at most" if figure in LOWER_IS_BETTER else "at least"
            missed.append(f"eval.gate: {key} is {value:.4f} and must be {wanted} {bound:g}")
    return missed


def _figure(artifact: dict[str, Any], figure: str) -> float:
    found = artifact["metrics"].get(figure, artifact.get(figure))
    return float(found["value"] if isinstance(found, dict) else found)


def _level(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _difference(interval: Interval) -> dict[str, float]:
    return {"difference": interval.value, "low": interval.low, "high": interval.high}
