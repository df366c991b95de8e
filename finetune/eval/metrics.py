"""How an answer is compared with its reference: each metric is a function of two texts, between 0 and 1."""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

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


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "json_valid": json_valid,
    "json_fields": json_fields,
    "json_exact": json_exact,
    "number": number,
    "label": label,
}


def repetition(tokens: Sequence[int]) -> float:
    """Share of an answer's four-token pieces that stood in it before: 0 for fresh text, towards 1 for a loop."""
    pieces = [tuple(tokens[start : start + 4]) for start in range(len(tokens) - 3)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


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


def _words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _plain_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


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
