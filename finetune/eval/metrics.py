"""Metrics of an answer: each is a function of the answer and its row, and returns a number from 0 to 1."""

import ast
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import regex

from finetune.errors import EvalError
from finetune.eval.sandbox import check_sandbox, run_program
from finetune.inference.rows import Row, open_dataset

FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u30fc\uff70"
"""Scripts that are written without spaces between words, with Japanese's mark of a long vowel."""

WORD = regex.compile(rf"[{SPACELESS}]|[\p{{L}}\p{{M}}\p{{N}}--[{SPACELESS}]]+", regex.V1)
"""A word: letters with their marks, and digits. In scripts without spaces it is one letter, as in sacrebleu's
tokenizers ``zh`` and ``char``."""

PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]")
"""Python's ``string.punctuation``, and that of other scripts."""

AROUND_LABELS = string.whitespace + "\"'`“”‘’«»()[]{}<>.,;:!?*_。、，；：！？「」『』（）।"
"""Quotes, brackets, and what ends a sentence; not signs, which tell ``-1`` from ``1``."""

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact_match(answer: str, reference: str) -> float:
    """Returns 1 for the same text, ignoring surrounding space."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Returns the F1 of words; 0 without words.

    Source: the evaluation scripts of SQuAD 1.1, and of MLQA for scripts without spaces.
    """
    ours, theirs = _words(answer), _words(reference)
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def rouge_1(answer: str, reference: str) -> float:
    """Returns the F1 of single words, like the package rouge-score without stemming, for letters of any language.

    As there, texts without words score 0, also where they are the same.
    """
    return _rouge(answer, reference, size=1)


def rouge_2(answer: str, reference: str) -> float:
    """Returns the F1 of pairs of neighbouring words."""
    return _rouge(answer, reference, size=2)


def rouge_l(answer: str, reference: str) -> float:
    """Returns the F1 of the longest common subsequence of words. Source: Lin 2004, with equal weights."""
    ours, theirs = _plain_words(answer), _plain_words(reference)
    return _f1(_common_subsequence(ours, theirs), len(ours), len(theirs))


def json_valid(answer: str, reference: str) -> float:
    """Returns 1 if the answer is JSON."""
    return float(_json(answer) is not _INVALID)


def json_fields(answer: str, reference: str) -> float:
    """Returns the share of the reference's fields that the answer has with the same value; counts leaves."""
    ours, theirs = _json(answer), _json(reference)
    if theirs is _INVALID or ours is _INVALID:
        return 0.0
    wanted, answered = dict(_leaves(theirs)), dict(_leaves(ours))
    if not wanted:
        return float(_equal(ours, theirs))
    return sum(path in answered and _equal(answered[path], value) for path, value in wanted.items()) / len(wanted)


def json_exact(answer: str, reference: str) -> float:
    """Returns 1 for the same JSON value; order of fields and spaces do not matter."""
    ours, theirs = _json(answer), _json(reference)
    return float(theirs is not _INVALID and ours is not _INVALID and _equal(ours, theirs))


def number(answer: str, reference: str) -> float:
    """Returns 1 for the same final number: the one after ``####`` (GSM8K), or else the last one in the text."""
    ours, theirs = _final_number(answer), _final_number(reference)
    return float(theirs is not None and ours is not None and abs(ours - theirs) <= 1e-6 * max(1.0, abs(theirs)))


def label(answer: str, reference: str) -> float:
    """Returns 1 for the same class: compares the first line, ignoring case, surrounding quotes and a sentence's end."""
    return float(_label(answer) == _label(reference))


def number_given(answer: str, reference: str) -> float:
    """Returns 1 if the answer contains a number."""
    return float(_final_number(answer) is not None)


def label_known(answer: str, row: Row) -> float:
    """Returns 1 if the answer is one of ``row["classes"]``, the classes of the held-out answers."""
    return float(_label(answer) in {_label(known) for known in row["classes"]})


def code_valid(answer: str, reference: str) -> float:
    """Returns 1 if the answer's code parses as Python and has a statement."""
    try:
        return float(bool(ast.parse(extract_code(answer)).body))
    # ValueError: a null byte; the last two: nested too deeply.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0


def pass_at_1(answer: str, row: Row) -> float:
    """Returns 1 if the answer's code passes ``row["tests"]`` in the sandbox."""
    return float(run_program(f"{extract_code(answer)}\n", tests=row["tests"]).passed)


def extract_code(answer: str) -> str:
    """Returns the first fenced block, or the whole answer if there is none."""
    fenced = FENCE.search(answer)
    return fenced.group(1) if fenced else answer


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Returns the unbiased estimate of the chance that one of k samples passes.

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, equation 1.

    Args:
        samples: Programs written for one problem, at least k.
        passed: How many of them passed.
    """
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def _by_reference(metric: Callable[[str, str], float]) -> Callable[[str, Row], float]:
    return lambda answer, row: metric(answer, row["reference"])


METRICS: dict[str, Callable[[str, Row], float]] = {
    "exact_match": _by_reference(exact_match),
    "token_f1": _by_reference(token_f1),
    "rouge_1": _by_reference(rouge_1),
    "rouge_2": _by_reference(rouge_2),
    "rouge_l": _by_reference(rouge_l),
    "json_valid": _by_reference(json_valid),
    "json_fields": _by_reference(json_fields),
    "json_exact": _by_reference(json_exact),
    "number": _by_reference(number),
    "number_given": _by_reference(number_given),
    "label": _by_reference(label),
    "code_valid": _by_reference(code_valid),
    "label_known": label_known,
    "pass_at_1": pass_at_1,
}

NEEDS = {"pass_at_1": "tests"}
"""The column that a metric needs in addition to the reference."""


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuses metrics that this machine cannot compute, before any work.

    Raises:
        EvalError: Tests cannot be run here.
    """
    if "pass_at_1" in metrics:
        check_sandbox()


def prepare_rows(rows: Sequence[dict[str, Any]], metrics: Sequence[str], heldout: Path) -> None:
    """Checks that the rows have what the metrics need, and adds the ``classes`` of the held-out answers to each.

    Args:
        heldout: The split that the rows are from; all its rows define the classes.

    Raises:
        EvalError: A row lacks tests.
    """
    for metric in metrics:
        column = NEEDS.get(metric)
        lacking = [row["row"] for row in rows if column and not str(row.get(column) or "").strip()]
        if lacking:
            raise EvalError(
                f"eval.metrics: {metric} needs {column!r} in every held-out row, and {len(lacking)} have none "
                f"(the first is row {lacking[0]}); add it to the data, or leave {metric} out"
            )
    if "label_known" in metrics:
        classes = sorted(set(open_dataset(heldout)["reference"]))
        for row in rows:
            row["classes"] = classes


def repetition(tokens: Sequence[int]) -> float:
    """Returns the share of four-token pieces that occurred earlier in the answer: near 1 for a loop."""
    pieces = _pieces(tokens, 4)
    return 1 - len(pieces) / pieces.total() if pieces else 0.0


_INVALID = object()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _INVALID


def _leaves(value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Returns the values that are not objects, or are empty, with their paths. Answers may nest deeper than Python."""
    leaves: list[tuple[tuple[str, ...], Any]] = []
    pending: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while pending:
        path, item = pending.pop()
        if isinstance(item, dict) and item:
            pending += [((*path, key), inner) for key, inner in item.items()]
        elif path:
            leaves.append((path, item))
    return leaves


def _equal(left: Any, right: Any) -> bool:
    """Compares JSON values, for which ``True`` and ``1`` differ."""
    pending = [(left, right)]
    while pending:
        ours, theirs = pending.pop()
        if isinstance(ours, bool) != isinstance(theirs, bool):
            return False
        if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
            pending += [(ours[key], theirs[key]) for key in ours]
        elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
            pending += zip(ours, theirs, strict=True)
        elif isinstance(ours, dict | list) or ours != theirs:
            return False
    return True


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _rouge(answer: str, reference: str, *, size: int) -> float:
    ours, theirs = (_pieces(_plain_words(text), size) for text in (answer, reference))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _pieces(words: Sequence[Any], size: int) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _words(text: str) -> list[str]:
    spaced = regex.sub(rf"([{SPACELESS}])", r" \1 ", PUNCTUATION.sub("", text.lower()))
    return [word for word in spaced.split() if word not in ("a", "an", "the")]


def _plain_words(text: str) -> list[str]:
    return WORD.findall(text.lower())


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
    numbers = NUMBER.findall(marked)
    if not numbers:
        return None
    return float((numbers[0] if marked is not text else numbers[-1]).replace(",", ""))


def _label(text: str) -> str:
    line = next(iter(text.strip().splitlines()), "")
    return (line.strip(AROUND_LABELS) or line.strip()).lower()
