"""Scores answers of an artifact after the evaluation, by its rules and against its results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.eval.config import EvalConfig
from finetune.scores import ExportAnswers, ModelAnswers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.inference.generation import Answer
    from finetune.inference.losses import RowLoss

EXPORT = "export"


@dataclass(frozen=True, kw_only=True)
class AnswerScorer:
    """Scores answers as the evaluation did, and compares them with its artifacts' answers.

    Attributes:
        config: The eval group.
        folder: The stage's folder; each artifact's losses and answers are in it.
        seed: Of the bootstrap.
    """

    config: EvalConfig
    folder: Path
    seed: int

    def losses(self, artifact: str, *, rows: int) -> list[RowLoss]:
        """Returns an artifact's losses on the first held-out rows."""
        from finetune.eval.records import read_record

        return read_record(self.folder / f"{artifact}.rows.jsonl").losses[:rows]

    def score_against(
        self,
        artifact: str,
        answers: Sequence[Answer],
        *,
        heldout: Path,
        tokenizer: PreTrainedTokenizerBase,
        file: Path,
        seconds: float,
    ) -> ExportAnswers:
        """Scores answers to the first held-out prompts, and compares them with an artifact's own answers.

        Args:
            artifact: One that the evaluation has answers of.
            answers: In the order of the rows.
            heldout: The split.
            tokenizer: Decodes the answers.
            file: Receives each answer with its scores, one line of JSON each.
            seconds: Time that the answers took.
        """
        from finetune.eval.figures import answer_changes, answer_levels, tabulate
        from finetune.eval.metrics import prepare_rows
        from finetune.eval.records import Record, read_record
        from finetune.inference.rows import read_rows

        config, seed, metrics = self.config, self.seed, self.config.metrics
        rows = read_rows(heldout, limit=len(answers))
        prepare_rows(rows, metrics, heldout)
        records = {
            artifact: read_record(self.folder / f"{artifact}.rows.jsonl"),
            EXPORT: Record(losses=[], general=[], answers=dict(enumerate(answers))),
        }

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        table = tabulate(records, rows=rows, metrics=metrics, decode=decode)
        model, export = table.answers[artifact], table.answers[EXPORT]
        with open(file, "w", encoding="utf-8") as handle:
            for number, (row, text) in enumerate(zip(rows, table.texts[EXPORT], strict=True)):
                scores = {metric: float(export[metric].totals[number]) for metric in metrics}
                line = {"row": int(row["row"]), "reference": row["reference"], "answer": text, "scores": scores}
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        return ExportAnswers(
            rows=len(rows),
            **vars(answer_levels(export, config=config, seed=seed)),
            model=ModelAnswers(name=artifact, **vars(answer_levels(model, config=config, seed=seed))),
            changes=answer_changes(model, export, config=config, seed=seed),
            seconds=round(seconds, 1),
        )
