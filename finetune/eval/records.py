"""What one artifact did on each row, kept on disk while it is measured, so that an interrupted stage goes on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.inference.generation import Answer
from finetune.inference.losses import RowLoss


@dataclass(slots=True)
class Record:
    """Losses and answers of one artifact, by row number in the evaluation; general text's losses beside them."""

    losses: list[RowLoss]
    general: list[RowLoss]
    answers: dict[int, Answer]
    harness: dict[str, Any] | None = None


class RecordFile:
    """Lines of JSON: first what they hold for, then the losses of the task and of general text, then one answer each.

    Args:
        file: Read if it is there and holds for the same key; else begun anew.
        key: Names the artifact, the settings and the rows.
    """

    def __init__(self, file: Path, *, key: str) -> None:
        self.file = file
        self.record = Record(losses=[], general=[], answers={})
        lines = whole_lines(file)
        if lines and lines[0] == {"key": key}:
            self.record = _record(lines)
        else:
            file.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")

    def add_losses(self, losses: list[RowLoss]) -> None:
        self._append({"losses": [[row.loss, row.tokens, row.correct] for row in losses]})
        self.record.losses = losses

    def add_general(self, losses: list[RowLoss]) -> None:
        self._append({"general": [[row.loss, row.tokens, row.correct] for row in losses]})
        self.record.general = losses

    def add_answer(self, number: int, answer: Answer) -> None:
        self._append({"row": number, "tokens": answer.tokens, "stopped": answer.stopped})
        self.record.answers[number] = answer

    def add_harness(self, found: dict[str, Any]) -> None:
        self._append({"harness": found})
        self.record.harness = found

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")


def read_record(file: Path) -> Record:
    """What an artifact did, after the stage is done."""
    return _record(whole_lines(file))


def _record(lines: list[dict[str, Any]]) -> Record:
    record = Record(losses=[], general=[], answers={})
    for line in lines[1:]:
        if "losses" in line:
            record.losses = _losses(line["losses"])
        elif "general" in line:
            record.general = _losses(line["general"])
        elif "harness" in line:
            record.harness = line["harness"]
        else:
            record.answers[line["row"]] = Answer(tokens=line["tokens"], stopped=line["stopped"])
    return record


def _losses(content: list[list[Any]]) -> list[RowLoss]:
    return [RowLoss(loss=loss, tokens=tokens, correct=correct) for loss, tokens, correct in content]


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """The lines that were written whole: a process that was killed may have left half of one, which is cut off."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
