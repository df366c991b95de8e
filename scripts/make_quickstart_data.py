"""Writes the quickstart's data set: short requests to a household assistant, each with the one JSON object it means.

    python scripts/make_quickstart_data.py [folder]

Reads ``data/quickstart/phrasings.yaml``; writes ``train.jsonl`` and ``heldout.jsonl`` next to it, or into ``folder``.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

SOURCE = Path(__file__).parent.parent / "data" / "quickstart" / "phrasings.yaml"
SEED = 20261101
ROWS = {"train": 1280, "heldout": 160}
SYSTEM = "Turn the request into JSON."
MOST_TRIES = 200
UNSEEN_SHARE = 0.5
CASUAL_SHARE = 0.25
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]

Item = TypeVar("Item")
Value = tuple[str, Any]
"""The words of the request, and the value that represents them in the answer."""


class Speaker:
    """Draws slot values. Uses only ``random()``, whose sequence Python keeps between versions."""

    def __init__(self, values: dict[str, Any], *, seed: int, unseen: bool) -> None:
        self.values = values
        self.unseen = unseen
        self.chance = random.Random(seed).random
        self.computed: dict[str, Callable[[], Value]] = {
            "morning": lambda: self.time(range(5, 11)),
            "evening": lambda: self.time(range(17, 22)),
            "clock": lambda: self.time(range(7, 21)),
            "minutes": self.minutes,
            "people": lambda: self.number(range(2, 11)),
            "percent": lambda: self.figure(range(10, 100, 5)),
            "degrees": lambda: self.number(range(16, 26)),
            "amount": lambda: self.figure(
                [5, 10, 12, 15, 20, 25, 30, 35, 40, 50, 60, 75, 80, 90, 100, 120, 150, 200, 250, 300, 500]
            ),
            "items": self.items,
        }

    def pick(self, options: Sequence[Item]) -> Item:
        return options[int(self.chance() * len(options))]

    def value(self, kind: str) -> Value:
        if kind in self.computed:
            return self.computed[kind]()
        listed = self.values[kind]
        if isinstance(listed, dict) and "seen" not in listed:
            return self.pick(list(listed.items()))
        word = self.word(kind)
        return word, word

    def word(self, kind: str) -> str:
        listed = self.values[kind]
        return self.pick(listed["unseen"] if self.unseen and self.chance() < UNSEEN_SHARE else listed["seen"])

    def time(self, hours: range) -> Value:
        hour, minute = self.pick(hours), self.pick([0, 0, 15, 30, 30, 45])
        return self.pick([_clock_12, _clock_12, _clock_24, _spoken])(hour, minute), f"{hour:02d}:{minute:02d}"

    def minutes(self) -> Value:
        special = {"half an hour": 30, "an hour": 60, "a quarter of an hour": 15}
        if self.chance() < 0.15:
            return self.pick(list(special.items()))
        text, count = self.number([2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 18, 20, 25, 30, 35, 40, 45, 50, 55, 90])
        return f"{text} minutes", count

    def number(self, options: Sequence[int]) -> Value:
        count = self.pick(options)
        return (WORDS[count] if count < len(WORDS) and self.chance() < 0.5 else str(count)), count

    def figure(self, options: Sequence[int]) -> Value:
        count = self.pick(options)
        return str(count), count

    def items(self) -> Value:
        wanted = self.pick([1, 2, 2, 3])
        chosen: list[str] = []
        while len(chosen) < wanted:
            item = self.word("item")
            if item not in chosen:
                chosen.append(item)
        return " and ".join(filter(None, [", ".join(chosen[:-1]), chosen[-1]])), chosen


def _half_of_day(hour: int) -> str:
    return "in the morning" if hour < 12 else "in the afternoon" if hour < 17 else "in the evening"


def _clock_12(hour: int, minute: int) -> str:
    return f"{(hour - 1) % 12 + 1}{f':{minute:02d}' if minute else ''} {'am' if hour < 12 else 'pm'}"


def _clock_24(hour: int, minute: int) -> str:
    return f"{hour}:{minute:02d}"


def _spoken(hour: int, minute: int) -> str:
    """``7, 45`` -> ``quarter to eight in the morning``."""
    named = WORDS[(hour + (minute == 45) - 1) % 12 + 1]
    start = {0: "", 15: "quarter past ", 30: "half past ", 45: "quarter to "}[minute]
    return f"{start}{named} {_half_of_day(hour)}"


def fill(speaker: Speaker, *, intent: str, slots: dict[str, str], phrasing: str) -> tuple[str, dict[str, Any]]:
    """One request and its answer. Slots that the phrasing does not name are absent from the answer."""
    drawn: dict[str, Value] = {}
    for slot, kind in slots.items():
        if f"{{{slot}}}" in phrasing:
            drawn[slot] = speaker.value(kind)
            while [text for text, _ in drawn.values()].count(drawn[slot][0]) > 1:
                drawn[slot] = speaker.value(kind)
    text = phrasing.format(**{slot: words for slot, (words, _) in drawn.items()})
    text = text[0].upper() + text[1:]
    if speaker.chance() < CASUAL_SHARE:
        text = text.rstrip(".")
    return text, {"intent": intent, **{slot: written for slot, (_, written) in drawn.items()}}


def rows(source: dict[str, Any], *, part: str, seed: int, taken: set[str]) -> Iterator[dict[str, Any]]:
    """As many rows for each intent, its phrasings in turn; no request twice."""
    speaker = Speaker(source["values"], seed=seed, unseen=part == "heldout")
    for intent, about in source["intents"].items():
        phrasings = about[part]
        for index in range(ROWS[part] // len(source["intents"])):
            turn = index % len(phrasings)
            for _ in range(MOST_TRIES):
                text, answer = fill(speaker, intent=intent, slots=about["slots"], phrasing=phrasings[turn])
                if text.rstrip(".") not in taken:
                    break
                turn = (turn + 1) % len(phrasings)
            else:
                raise ValueError(f"{intent}: too few values for {ROWS[part]} different rows; add phrasings or values")
            taken.add(text.rstrip("."))
            yield _row(text, answer, template=f"{intent}/{part}/{turn:02d}")


def _row(text: str, answer: dict[str, Any], *, template: str) -> dict[str, Any]:
    turns = {"system": SYSTEM, "user": text, "assistant": json.dumps(answer, separators=(",", ":"), ensure_ascii=False)}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    return {"messages": messages, "template": template, "intent": answer["intent"]}


def write(folder: Path) -> dict[str, Path]:
    """Writes both files and returns where they are. The same bytes every time."""
    source = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    taken: set[str] = set()
    files = {}
    for offset, part in enumerate(ROWS):
        made = list(rows(source, part=part, seed=SEED + offset, taken=taken))
        chance = random.Random(SEED - 1 - offset).random
        made.sort(key=lambda _: chance())
        files[part] = folder / f"{part}.jsonl"
        files[part].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return files


if __name__ == "__main__":
    for file in write(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE.parent).values():
        print(f"{file}: {file.stat().st_size} bytes")
