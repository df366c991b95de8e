"""How an answer is judged: each metric is a function of the answer and its row, between 0 and 1."""

import ast
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import EvalError
from finetune.eval.sandbox import run
from finetune.inference.rows import Row, open_dataset

FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact_match(answer: str, reference: str) -> float:
    """The same text, but for space around it."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words. Source: the SQuAD 1.1 evaluation script."""
    ours, theirs = _words(answer), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def rouge_1(answer: str, reference: str) -> float:
    """F1 of single words, as the package rouge-score counts it without stemming; its letters are ASCII's, ours any language's."""
    return _rouge(answer, reference, size=1)


def rouge_2(answer: str, reference: str) -> float:
    """The same of pairs of neighbouring words."""
    return _rouge(answer, reference, size=2)


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words. Source: Lin 2004, with precision and recall weighed alike."""
    ours, theirs = _plain_words(answer), _plain_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(_common_subsequence(ours, theirs), len(ours), len(theirs))


def json_valid(answer: str, reference: str) -> float:
    """The answer is JSON, whatever it says."""
    return float(_json(answer) is not _INVALID)


def json_fields(answer: str, reference: str) -> float:
    """Share of the reference's fields that the answer has with the same value; nested objects count by their leaves."""
    ours, theirs = _json(answer), _json(reference)
    if theirs is _INVALID or ours is _INVALID:
        return 0.0
    wanted, got = dict(_leaves(theirs)), dict(_leaves(ours))
    if not wanted:
        return float(_equal(ours, theirs))
    return sum(path in got and _equal(got[path], value) for path, value in wanted.items()) / len(wanted)


def json_exact(answer: str, reference: str) -> float:
    """The same JSON value: all fields right, none too many; order and spaces do not matter."""
    ours, theirs = _json(answer), _json(reference)
    return float(theirs is not _INVALID and ours is not _INVALID and _equal(ours, theirs))


def number(answer: str, reference: str) -> float:
    """The same final number: what follows ``####`` if there is such a mark, else the last one in the text (GSM8K)."""
    ours, theirs = _final_number(answer), _final_number(reference)
    return float(theirs is not None and ours is not None and abs(ours - theirs) <= 1e-6 * max(1.0, abs(theirs)))


def label(answer: str, reference: str) -> float:
    """The same class: first line, without case, quotes and punctuation around it."""
    return float(_label(answer) == _label(reference))


def number_given(answer: str, reference: str) -> float:
    """There is a number, whichever."""
    return float(_final_number(answer) is not None)


def label_known(answer: str, row: Row) -> float:
    """The answer is one of ``row["classes"]``, right or not: the classes that held-out answers have."""
    return float(_label(answer) in {_label(known) for known in row["classes"]})


def code_valid(answer: str, reference: str) -> float:
    """The answer's code can be read as Python, whatever it does."""
    try:
        ast.parse(code_of(answer))
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # ValueError: a null byte; the last two: nested too deeply
        return 0.0
    return 1.0


def pass_at_1(answer: str, row: Row) -> float:
    """The answer's code, followed by ``row["tests"]``, runs to its end in the sandbox."""
    return float(run(f"{code_of(answer)}\n\n{row['tests']}\n").passed)


def code_of(answer: str) -> str:
    """What stands in the first fenced block, or all of it where there is none."""
    fenced = FENCE.search(answer)
    return fenced.group(1) if fenced else answer


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that one of k samples passes, estimated without bias from more of them.

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, equation 1.

    Args:
        samples: Programs written for one problem, at least k.
        passed: How many of them passed.
    """
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def _by_reference(metric: Callable[[str, str], float]) -> Callable[[str, Row], float]:
    return lambda answer, row: metric(answer, row["reference"])


METRICS: dict[str, Callable[[str, Row], float]] = {
    **{metric.__name__: _by_reference(metric) for metric in (
        exact_match, token_f1, rouge_1, rouge_2, rouge_l, json_valid, json_fields, json_exact, number, number_given, label, code_valid,
    )},
    "label_known": label_known,
    "pass_at_1": pass_at_1,
}  # fmt: skip


NEEDS = {"pass_at_1": "tests"}
"""What a metric asks of a row beside the reference."""


def prepare_rows(rows: Sequence[dict[str, Any]], metrics: Sequence[str], heldout: Path) -> None:
    """Sees that the rows have what the metrics ask for, and gives each the ``classes`` that held-out answers have.

    Args:
        heldout: The split that the rows are from, for the classes of the others.

    Raises:
        EvalError: A row has no tests.
    """
    for metric in metrics:
        column = NEEDS.get(metric)
        bare = [row["row"] for row in rows if column and not row.get(column)]
        if bare:
            raise EvalError(
                f"eval.metrics: {metric} needs {column!r} in every held-out row, and {len(bare)} have none (the first is row {bare[0]}); "
                f"add it to the data, or leave {metric} out"
            )
    if "label_known" in metrics:
        classes = sorted(set(open_dataset(heldout)["reference"]))
        for row in rows:
            row["classes"] = classes


def repetition(tokens: Sequence[int]) -> float:
    """Share of an answer's four-token pieces that stood in it before: 0 for fresh text, towards 1 for a loop."""
    pieces = _pieces(tokens, 4)
    return 1 - len(pieces) / pieces.total() if pieces else 0.0


_INVALID = object()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _INVALID


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, dict) and (value or path):
        found = [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
        return found or [(path, value)]
    return [(path, value)] if path else []


def _equal(one: Any, other: Any) -> bool:
    """Python's ``True == 1`` is no equality of JSON values."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs)


def _rouge(answer: str, reference: str, *, size: int) -> float:
    ours, theirs = (_pieces(_plain_words(text), size) for text in (answer, reference))
    if not ours or not theirs:
        return float(_plain_words(answer) == _plain_words(reference))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _pieces(words: Sequence[Any], size: int) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _plain_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _common_subsequence(ours: list[str], theirs: list[str]) -> int:
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for place, other in enumerate(theirs, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def _final_number(text: str) -> float | None:
    marked = text.rpartition("####")[2] if "####" in text else text
    found = NUMBER.findall(marked)
    if not found:
        return None
    return float((found[0] if marked is not text else found[-1]).replace(",", ""))


def _label(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip().strip(string.punctuation + string.whitespace).lower() if lines else ""
