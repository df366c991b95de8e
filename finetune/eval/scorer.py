"""What the evaluation measured, and its rules, for whoever opens an artifact later and elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.eval.config import EvalConfig

if TYPE_CHECKING:
    from finetune.inference.generation import Answer
    from finetune.inference.losses import RowLoss

OWN = "own"


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Judges answers as the stage judged its own, and holds them beside these.

    Attributes:
        config: The eval group.
        folder: The stage's folder; each artifact's losses and answers are in it.
        seed: Of the bootstrap.
    """

    config: EvalConfig
    folder: Path
    seed: int

    def losses(self, artifact: str, *, rows: int) -> list[RowLoss]:
        """What the first held-out rows cost an artifact."""
        from finetune.eval.records import read_record

        return read_record(self.folder / f"{artifact}.rows.jsonl").losses[:rows]

    def beside(
        self, artifact: str, answers: Sequence[Answer], *, heldout: Path, tokenizer: Any, file: Path
    ) -> dict[str, Any]:
        """Judges answers to the first held-out prompts beside an artifact's own to the same.

        Args:
            artifact: One that the stage has answers of.
            answers: In the order of the rows.
            heldout: The split.
            tokenizer: Writes tokens as text.
            file: Gets each answer with its scores, a line of JSON each.

        Returns:
            ``{"rows", "metrics": {name: {"value", "low", "high"}}, "stop_rate", "mean_tokens", "repetition", "model", "changes"}``:
            ``model`` names the artifact and holds the same figures of it, and ``changes`` the differences from it, paired by row.
        """
        from finetune.eval.figures import answer_changes, answer_levels, tabulate
        from finetune.eval.metrics import prepare_rows
        from finetune.eval.records import Record, read_record
        from finetune.inference.rows import read_rows

        metrics = self.config.metrics
        rows = read_rows(heldout, limit=len(answers))
        prepare_rows(rows, metrics, heldout)
        records = {
            artifact: read_record(self.folder / f"{artifact}.rows.jsonl"),
            OWN: Record(losses=[], general=[], answers=dict(enumerate(answers))),
        }
        found = tabulate(
            records, rows=rows, metrics=metrics, decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
        )
        scores = [
            {metric: float(found.answers[OWN][metric].totals[number]) for metric in metrics}
            for number in range(len(rows))
        ]
        lines = [
            {"row": int(row["row"]), "reference": row["reference"], "answer": text, "scores": one}
            for row, text, one in zip(rows, found.texts[OWN], scores, strict=True)
        ]
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        settings: dict[str, Any] = {"config": self.config, "seed": self.seed}
        return {
            "rows": len(rows),
            **answer_levels(found.answers[OWN], **settings),
            "model": {"name": artifact, **answer_levels(found.answers[artifact], **settings)},
            "changes": answer_changes(found.answers[artifact], found.answers[OWN], **settings),
        }
