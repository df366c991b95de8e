"""Stores one artifact's results of each row while it is measured, so that an interrupted stage can continue."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.inference.generation import Answer
from finetune.inference.losses import RowLoss
from finetune.jsonable import from_json, to_jsonable
from finetune.scores import HarnessScores


@dataclass(slots=True)
class Record:
    """Losses and answers of one artifact, by row number in the evaluation, and its losses on general text."""

    losses: list[RowLoss]
    general: list[RowLoss]
    answers: dict[int, Answer]
    harness: HarnessScores | None = None


class RecordFile:
    """A JSON Lines file: first the key, then the losses of the task and of general text, then one answer per line.

    Args:
        file: Read if it exists and has the same key, overwritten otherwise.
        key: Identifies the artifact, the settings and the rows.
    """

    def __init__(self, file: Path, *, key: str) -> None:
        self.file = file
        self.record = Record(losses=[], general=[], answers={})
        lines = complete_lines(file)
        if lines and lines[0] == {"key": key}:
            self.record = _record(lines)
        else:
            file.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")

    def add_losses(self, losses: list[RowLoss]) -> None:
        """Appends the losses of the task."""
        self._append({"losses": [[row.loss, row.tokens, row.correct] for row in losses]})
        self.record.losses = losses

    def add_general(self, losses: list[RowLoss]) -> None:
        """Appends the losses of general text."""
        self._append({"general": [[row.loss, row.tokens, row.correct] for row in losses]})
        self.record.general = losses

    def add_answer(self, number: int, answer: Answer) -> None:
        """Appends the answer to one row."""
        self._append({"row": number, "tokens": answer.tokens, "stopped": answer.stopped})
        self.record.answers[number] = answer

    def add_harness(self, results: HarnessScores) -> None:
        """Appends the results of lm-eval."""
        self._append({"harness": to_jsonable(results)})
        self.record.harness = results

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")


def read_record(file: Path) -> Record:
    """Reads an artifact's results, after the stage is done."""
    return _record(complete_lines(file))


def _record(lines: list[dict[str, Any]]) -> Record:
    record = Record(losses=[], general=[], answers={})
    for line in lines[1:]:
        if "losses" in line:
            record.losses = _losses(line["losses"])
        elif "general" in line:
            record.general = _losses(line["general"])
        elif "harness" in line:
            record.harness = from_json(HarnessScores, line["harness"])
        else:
            record.answers[line["row"]] = Answer(tokens=line["tokens"], stopped=line["stopped"])
    return record


def _losses(content: list[list[Any]]) -> list[RowLoss]:
    return [RowLoss(loss=loss, tokens=tokens, correct=correct) for loss, tokens, correct in content]


def complete_lines(file: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a file; cuts off a partial last line, which a killed process may have left."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        file.write_text(complete, encoding="utf-8")
    return [json.loads(line) for line in complete.splitlines()]
