"""Answers of the base and of the tuned model, row by row."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.html.format import MISSING, number
from finetune.report.run_data import Fields
from finetune.report.summary import headline_metric
from finetune.report.titles import ARTIFACTS, metric_title

MOST_ROWS = 500
"""Rows on the page; the file behind it has all of them."""

LONGEST_TEXT = 400
SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?s>")
TURN_STARTS = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|\[INST\]|<start_of_turn>|<\|(?=user\|>)")
TURN_ENDS = re.compile(r"<\|im_end\|>|<\|eot_id\|>|\[/INST\]|<end_of_turn>|<\|end\|>")


def answers(report: Fields, samples: Sequence[Fields]) -> Fields | None:
    """Collects the rows to show, in the order of the held-out rows; None where no answers were written."""
    if not samples:
        return None
    metric = headline_metric(report["eval"]) if report["eval"] else ""
    tuned = "merged" if samples[0].get("merged") is not None else "adapter"
    untuned = "base" if samples[0].get("base") is not None else "base_quantized"
    rows = [_row(row, untuned, tuned, metric) for row in samples[:MOST_ROWS]]
    gained = (row for row in samples if _score(row, tuned, metric) == 1 and _score(row, untuned, metric) == 0)
    example = next(gained, None)
    return {
        "metric": metric_title(metric),
        "tuned_title": ARTIFACTS[tuned],
        "example": None if example is None else _row(example, untuned, tuned, metric),
        "rows": rows,
        "of": len(samples),
        "scored": {kind: sum(row["kind"] == kind for row in rows) for kind in ("right", "wrong")},
    }


def _score(row: Fields, artifact: str, metric: str) -> float | None:
    return ((row.get("scores") or {}).get(artifact) or {}).get(metric)


def _row(row: Fields, untuned: str, tuned: str, metric: str) -> Fields:
    score = _score(row, tuned, metric)
    return {
        "kind": "" if score is None else "right" if score >= 1 else "wrong",
        "request": last_request(row["prompt"]),
        "reference": answer_text(row.get("reference")),
        "base": _answer(row, untuned, metric),
        "tuned": _answer(row, tuned, metric),
    }


def _answer(row: Fields, artifact: str, metric: str) -> Fields:
    text, value = answer_text(row.get(artifact)), _score(row, artifact, metric)
    if value is None:
        return {"text": text, "is_right": False, "word": ""}
    return {
        "text": text,
        "is_right": value >= 1,
        "word": "right" if value >= 1 else "wrong" if value <= 0 else number(value),
    }


def answer_text(content: object) -> str:
    """Returns an answer without special tokens, shortened if it is long."""
    return MISSING if content is None else _shortened(SPECIAL.sub("", str(content)).strip() or "(nothing)")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def last_request(prompt: str) -> str:
    """Returns the last user turn of a rendered prompt, without the template's marks."""
    turns = TURN_STARTS.split(prompt)
    requests = [turn for turn in turns if turn.lstrip().startswith("user")] or ([turns[-1]] if len(turns) > 1 else [])
    if not requests:
        return _shortened(SPECIAL.sub("", prompt).strip())
    text = TURN_ENDS.split(requests[-1].lstrip().removeprefix("user").removeprefix("|>"))[0]
    return _shortened(SPECIAL.sub("", text).strip())
