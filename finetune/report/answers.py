"""Base against tuned, row by row."""

import re
from collections.abc import Sequence
from html import escape

from finetune.report.format import ARTIFACTS, MISSING, metric_title, number
from finetune.report.markup import Html, joined, mark, section, table, tag
from finetune.report.run_data import Fields
from finetune.report.summary import headline_metric

FIRST_ROWS = 8
WORST_ROWS = 6
LONGEST_TEXT = 400
SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?s>")
TURN_STARTS = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|\[INST\]|<start_of_turn>|<\|(?=user\|>)")
TURN_ENDS = re.compile(r"<\|im_end\|>|<\|eot_id\|>|\[/INST\]|<end_of_turn>|<\|end\|>")


def answers(report: Fields, samples: Sequence[Fields]) -> Html:
    """The first rows as they come, then the worst of the others."""
    if not samples:
        return Html("")
    metric = headline_metric(report["eval"]) if report["eval"] else ""
    tuned = tuned_artifact(samples)
    first, others = samples[:FIRST_ROWS], samples[FIRST_ROWS:]
    wrong = sorted(
        ((value, row) for row in others if (value := score(row, tuned, metric)) is not None and value < 1),
        key=lambda pair: pair[0],
    )
    parts: list[object] = [
        tag(
            "p",
            f"The first {len(first)} held-out rows, not chosen by anyone. A tick stands for “{metric_title(metric).lower()}”.",
        ),
        _table(first, tuned, metric),
    ]
    if wrong:
        worst = [row for _, row in wrong[:WORST_ROWS]]
        told = f"{len(wrong)} of the other {len(others)} rows are not fully right. The {len(worst)} worst of them:"
        parts += [tag("h3", "Where it is still wrong"), tag("p", told), _table(worst, tuned, metric)]
    return section("answers", "Answers, before and after", *parts)


def tuned_artifact(samples: Sequence[Fields]) -> str:
    """The last artifact of the line that has answers."""
    return "merged" if samples and samples[0].get("merged") is not None else "adapter"


def score(row: Fields, artifact: str, metric: str) -> float | None:
    """One artifact's score on one row; None where it was not measured."""
    return ((row.get("scores") or {}).get(artifact) or {}).get(metric)


def _table(rows: Sequence[Fields], tuned: str, metric: str) -> Html:
    cells = [
        [
            last_request(row["prompt"]),
            code(row.get("reference")),
            _answer(row, "base", metric),
            _answer(row, tuned, metric),
        ]
        for row in rows
    ]
    return table(["Request", "Right answer", ARTIFACTS["base"], ARTIFACTS[tuned]], cells, text_columns=4)


def _answer(row: Fields, artifact: str, metric: str) -> Html:
    value = score(row, artifact, metric)
    if value is None:
        return code(row.get(artifact))
    word = "right" if value >= 1 else "wrong" if value <= 0 else number(value)
    return joined([code(row.get(artifact)), Html("<br>"), mark(value >= 1, word)])


def code(content: object) -> Html:
    """An answer as it was given, without special tokens, cut where it runs on; lines may break after a comma."""
    text = MISSING if content is None else SPECIAL.sub("", str(content)).strip() or "(nothing)"
    return tag("code", Html(escape(shortened(text)).replace(",", ",<wbr>")))


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def last_request(prompt: str) -> str:
    """What the user asked last, out of a rendered prompt: the template's marks and earlier turns are left out."""
    turns = TURN_STARTS.split(prompt)
    asked = [turn for turn in turns if turn.lstrip().startswith("user")] or ([turns[-1]] if len(turns) > 1 else [])
    text = TURN_ENDS.split(asked[-1].lstrip().removeprefix("user").removeprefix("|>"))[0] if asked else prompt
    return shortened(SPECIAL.sub("", text).strip())
