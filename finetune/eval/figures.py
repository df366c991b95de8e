"""From what was recorded row by row to figures with intervals, and to the samples that a reader can look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.eval.config import ARTIFACTS, CHANGES, LOWER_IS_BETTER, EvalConfig
from finetune.eval.metrics import METRICS, repetition
from finetune.eval.records import Record
from finetune.inference.bootstrap import Bootstrap, Ratio, mean_of, perplexity, token_loss
from finetune.inference.rows import Row


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


def tabulate(
    records: dict[str, Record], *, rows: Sequence[Row], metrics: list[str], decode: Callable[[list[int]], str]
) -> Table:
    """Scores every answer.

    Args:
        records: By artifact.
        rows: Those that answers were written for, with what the metrics ask of them.
        metrics: Names in `METRICS`.
        decode: Token ids to text, without special tokens.
    """
    losses = {name: token_loss(record.losses) for name, record in records.items()}
    general = {name: token_loss(record.general) for name, record in records.items() if record.general}
    texts = {
        name: [decode(record.answers[number].tokens) for number in range(len(rows))] for name, record in records.items()
    }
    answers = {}
    for name, record in records.items():
        written = [record.answers[number] for number in range(len(rows))]
        scored = {
            metric: [METRICS[metric](text, row) for text, row in zip(texts[name], rows, strict=True)]
            for metric in metrics
        }
        scored["stop_rate"] = [float(answer.stopped) for answer in written]
        scored["mean_tokens"] = [float(len(answer.tokens)) for answer in written]
        scored["repetition"] = [repetition(answer.tokens) for answer in written]
        answers[name] = {figure: mean_of(values) for figure, values in scored.items()} if rows else {}
    return Table(losses=losses, general=general, answers=answers, texts=texts)


def levels(table: Table, records: dict[str, Record], *, config: EvalConfig, seed: int) -> dict[str, dict[str, Any]]:
    """Each artifact's figures: ``loss``, ``perplexity``, ``tokens``, ``token_accuracy``, ``metrics`` with intervals, ..."""
    found: dict[str, dict[str, Any]] = {}
    for name in ARTIFACTS:
        losses = records[name].losses
        told = _draw(table.losses[name], config, seed).loss(table.losses[name])
        right = sum(row.correct for row in losses) / max(told["tokens"], 1)
        entry: dict[str, Any] = {
            **told,
            "token_accuracy": right,
            **answer_levels(table.answers[name], config=config, seed=seed),
        }
        if table.general:
            entry["general_loss"] = _draw(table.general[name], config, seed).level(table.general[name]).level
        found[name] = entry
    return found


def answer_levels(answers: dict[str, Ratio], *, config: EvalConfig, seed: int) -> dict[str, Any]:
    """``metrics`` with intervals, and how the answers ended."""
    metrics = {
        figure: _draw(ratio, config, seed).level(ratio).level
        for figure, ratio in answers.items()
        if figure in config.metrics
    }
    return {
        "metrics": metrics,
        **{figure: ratio.value for figure, ratio in answers.items() if figure not in config.metrics},
    }


def answer_changes(
    before: dict[str, Ratio], after: dict[str, Ratio], *, config: EvalConfig, seed: int
) -> dict[str, dict[str, float]]:
    """Each figure of the answers, after minus before, paired by row."""
    return {
        figure: _draw(ratio, config, seed).difference(ratio, after[figure]).change for figure, ratio in before.items()
    }


def changes(table: Table, *, config: EvalConfig, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """What quantization cost, what tuning gained, what the merge cost, and all together, each paired by row."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for change, (before, after) in CHANGES.items():
        one, other = table.losses[before], table.losses[after]
        draw = _draw(one, config, seed)
        found[change] = {
            "loss": draw.difference(one, other).change,
            "perplexity": draw.difference(one, other, shape=perplexity).change,
        }
        if table.general:
            one, other = table.general[before], table.general[after]
            found[change]["general_loss"] = _draw(one, config, seed).difference(one, other).change
        found[change] |= answer_changes(table.answers[before], table.answers[after], config=config, seed=seed)
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
