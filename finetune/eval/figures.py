"""From what was recorded row by row to figures with intervals, and to the samples that a reader can look at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from finetune.measure.bootstrap import Bootstrap, Interval, Ratio, mean_of
from finetune.eval.config import ARTIFACTS, CHANGES, LOWER_IS_BETTER, EvalConfig
from finetune.eval.metrics import METRICS, repetition
from finetune.eval.records import Record

LARGEST_EXPONENT = 700.0
"""exp of more overflows a float64."""


def perplexity(loss: ndarray) -> ndarray:
    return np.exp(np.minimum(loss, LARGEST_EXPONENT))


@dataclass(frozen=True, slots=True)
class Table:
    """All artifacts' figures on the same rows.

    Attributes:
        losses: Per artifact, the loss of a token.
        answers: Per artifact and figure, the mean over answers.
        texts: Per artifact, its answers as text.
    """

    losses: dict[str, Ratio]
    answers: dict[str, dict[str, Ratio]]
    texts: dict[str, list[str]]


def tabulate(records: dict[str, Record], *, references: list[str], metrics: list[str], decode: Callable[[list[int]], str]) -> Table:
    """Scores every answer.

    Args:
        records: By artifact.
        references: The right answers of the first rows, as many as answers were written.
        metrics: Names in `METRICS`.
        decode: Token ids to text, without special tokens.
    """
    losses = {name: _loss(record) for name, record in records.items()}
    texts = {name: [decode(record.answers[n].tokens) for n in range(len(references))] for name, record in records.items()}
    answers = {}
    for name, record in records.items():
        written = [record.answers[number] for number in range(len(references))]
        scored = {metric: [METRICS[metric](text, right) for text, right in zip(texts[name], references, strict=True)] for metric in metrics}
        scored["stop_rate"] = [float(answer.stopped) for answer in written]
        scored["mean_tokens"] = [float(len(answer.tokens)) for answer in written]
        scored["repetition"] = [repetition(answer.tokens) for answer in written]
        answers[name] = {figure: mean_of(values) for figure, values in scored.items()} if references else {}
    return Table(losses=losses, answers=answers, texts=texts)


def _loss(record: Record) -> Ratio:
    totals = np.array([row.loss for row in record.losses], dtype=float)
    return Ratio(totals=totals, weights=np.array([row.tokens for row in record.losses], dtype=float))


def levels(table: Table, records: dict[str, Record], *, config: EvalConfig, seed: int) -> dict[str, dict[str, Any]]:
    """Each artifact's figures: ``loss``, ``perplexity``, ``tokens``, ``token_accuracy``, ``metrics`` with intervals, ..."""
    found: dict[str, dict[str, Any]] = {}
    for name in ARTIFACTS:
        losses = records[name].losses
        draw = Bootstrap(len(losses), samples=config.bootstrap_samples, seed=seed)
        loss, tokens = draw.level(table.losses[name]), sum(row.tokens for row in losses)
        entry: dict[str, Any] = {
            "loss": loss.value, "loss_low": loss.low, "loss_high": loss.high, "tokens": tokens,
            "perplexity": float(perplexity(np.array([loss.value]))[0]),
            "token_accuracy": sum(row.correct for row in losses) / max(tokens, 1), "metrics": {},
        }  # fmt: skip
        for figure, ratio in table.answers[name].items():
            answers = Bootstrap(len(ratio.totals), samples=config.bootstrap_samples, seed=seed)
            if figure in config.metrics:
                entry["metrics"][figure] = _level(answers.level(ratio))
            else:
                entry[figure] = ratio.value
        found[name] = entry
    return found


def changes(table: Table, *, config: EvalConfig, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """What quantization cost, what tuning gained, what the merge cost, and all together, each paired by row."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for change, (before, after) in CHANGES.items():
        one, other = table.losses[before], table.losses[after]
        draw = Bootstrap(len(one.totals), samples=config.bootstrap_samples, seed=seed)
        found[change] = {
            "loss": _difference(draw.difference(one, other)),
            "perplexity": _difference(draw.difference(one, other, shape=perplexity)),
        }
        for figure, ratio in table.answers[before].items():
            answers = Bootstrap(len(ratio.totals), samples=config.bootstrap_samples, seed=seed)
            found[change][figure] = _difference(answers.difference(ratio, table.answers[after][figure]))
    return found


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
    return float(artifact["metrics"][figure]["value"] if figure in artifact["metrics"] else artifact[figure])


def _level(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _difference(interval: Interval) -> dict[str, float]:
    return {"difference": interval.value, "low": interval.low, "high": interval.high}
