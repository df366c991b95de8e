"""Turns per-row results into figures with intervals, and into text that a reader can look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.eval.config import CHANGES, LOWER_IS_BETTER, EvalConfig
from finetune.eval.metrics import METRICS, repetition
from finetune.eval.records import Record
from finetune.inference.bootstrap import Bootstrap, Ratio, mean_of, perplexity, token_loss
from finetune.inference.chat import without_thought
from finetune.inference.rows import Row
from finetune.scores import AnswerScores, ArtifactScores, Difference, Interval


@dataclass(frozen=True, slots=True)
class Table:
    """Per-row figures of all artifacts on the same rows.

    Attributes:
        losses: Per artifact, the loss per token.
        general: Per artifact, the loss per token of general text; empty without general text.
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
    """Scores every answer, without its thought: references have none.

    Args:
        records: By artifact.
        rows: Those that were answered, with the columns that the metrics need.
        metrics: Names in `METRICS`.
        decode: Token ids to text, without special tokens.
    """
    losses = {name: token_loss(record.losses) for name, record in records.items()}
    general = {name: token_loss(record.general) for name, record in records.items() if record.general}
    texts: dict[str, list[str]] = {}
    answers: dict[str, dict[str, Ratio]] = {}
    for name, record in records.items():
        written = [record.answers[number] for number in range(len(rows))]
        texts[name] = [decode(answer.tokens) for answer in written]
        pairs = list(zip(map(without_thought, texts[name]), rows, strict=True))
        scores = {metric: [METRICS[metric](text, row) for text, row in pairs] for metric in metrics}
        scores["stop_rate"] = [float(answer.stopped) for answer in written]
        scores["mean_tokens"] = [float(len(answer.tokens)) for answer in written]
        scores["repetition"] = [repetition(answer.tokens) for answer in written]
        answers[name] = {figure: mean_of(values) for figure, values in scores.items()} if rows else {}
    return Table(losses=losses, general=general, answers=answers, texts=texts)


def levels(table: Table, records: dict[str, Record], *, config: EvalConfig, seed: int) -> dict[str, ArtifactScores]:
    """Returns the figures of each artifact."""
    artifacts: dict[str, ArtifactScores] = {}
    for name in records:
        loss = _bootstrap(table.losses[name], config, seed).loss(table.losses[name])
        correct = sum(row.correct for row in records[name].losses)
        general = table.general.get(name)
        artifacts[name] = ArtifactScores(
            **vars(loss),
            token_accuracy=correct / max(loss.tokens, 1),
            **vars(answer_levels(table.answers[name], config=config, seed=seed)),
            general_loss=_bootstrap(general, config, seed).level(general) if general else None,
            harness=records[name].harness,
        )
    return artifacts


def answer_levels(answers: dict[str, Ratio], *, config: EvalConfig, seed: int) -> AnswerScores:
    """Returns the metrics with intervals, and the other figures of the answers."""
    metrics = {figure: ratio for figure, ratio in answers.items() if figure in config.metrics}
    others = {figure: ratio.value for figure, ratio in answers.items() if figure not in config.metrics}
    return AnswerScores(
        metrics={name: _bootstrap(ratio, config, seed).level(ratio) for name, ratio in metrics.items()},
        stop_rate=others.get("stop_rate"),
        mean_tokens=others.get("mean_tokens"),
        repetition=others.get("repetition"),
    )


def answer_changes(
    before: dict[str, Ratio], after: dict[str, Ratio], *, config: EvalConfig, seed: int
) -> dict[str, Difference]:
    """Returns the change of each figure of the answers, after minus before, paired by row."""
    return {
        figure: _bootstrap(ratio, config, seed).difference(ratio, after[figure]) for figure, ratio in before.items()
    }


def changes(table: Table, *, config: EvalConfig, seed: int) -> dict[str, dict[str, Difference]]:
    """Returns the changes by quantization, by tuning, by the merge, and by all of them, each paired by row.

    Those of an artifact that was left out are missing.
    """
    by_step: dict[str, dict[str, Difference]] = {}
    for step, (first, second) in CHANGES.items():
        if first not in table.losses or second not in table.losses:
            continue
        before, after = table.losses[first], table.losses[second]
        bootstrap = _bootstrap(before, config, seed)
        figures = {
            "loss": bootstrap.difference(before, after),
            "perplexity": bootstrap.difference(before, after, shape=perplexity),
        }
        if table.general:
            before, after = table.general[first], table.general[second]
            figures["general_loss"] = _bootstrap(before, config, seed).difference(before, after)
        by_step[step] = figures | answer_changes(table.answers[first], table.answers[second], config=config, seed=seed)
    return by_step


def _bootstrap(figure: Ratio, config: EvalConfig, seed: int) -> Bootstrap:
    return Bootstrap(len(figure.totals), samples=config.bootstrap_samples, seed=seed)


def missed_gates(
    gate: dict[str, float], artifacts: dict[str, ArtifactScores], changed: dict[str, dict[str, Difference]]
) -> list[str]:
    """Returns one sentence for each threshold that was not met."""
    missed = []
    for key, bound in gate.items():
        subject, _, figure = key.partition(".")
        value = changed[subject][figure].difference if subject in changed else _figure(artifacts[subject], figure)
        met = value <= bound if figure in LOWER_IS_BETTER else value >= bound
        if not met:
            wanted = "at most" if figure in LOWER_IS_BETTER else "at least"
            missed.append(f"eval.gate: {key} is {value:.4f} and must be {wanted} {bound:g}")
    return missed


def _figure(artifact: ArtifactScores, figure: str) -> float:
    level = artifact.metrics.get(figure) or getattr(artifact, figure)
    return float(level.value if isinstance(level, Interval) else level)
