"""Rewards of sampled answers: the project's metrics, length and format, and functions of the user's own packages.

    rewards = Rewards(weights={"json_valid": 0.2, "json_fields": 0.8})
    rewards.score(['{"a": 1}'], [{"reference": '{"a": 2}'}], tokens=[6])  # [{"json_valid": 1.0, "json_fields": 0.0}]

A package adds a reward as an entry point of the group ``finetune.rewards``: a function of the answer and its row
(``reference``, ``tests``, ``chat``) that returns a finite number. It runs in the training process, without the limits
that the sandbox sets for ``pass_at_1``: install only packages that you trust.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import regex

from finetune.errors import ConfigError, TrainError
from finetune.eval.metrics import METRICS, NEEDS, check_metrics

GROUP = "finetune.rewards"
LENGTH, FORMAT, SANDBOXED = "length", "format", "pass_at_1"
WITHOUT_REFERENCE = {"json_valid", "number_given", "code_valid", SANDBOXED}
"""Metrics that read the answer alone, or tests."""

SHIPPED = (*(name for name in METRICS if name != "label_known"), LENGTH, FORMAT)
"""``label_known`` needs the classes of held-out answers, which training must not see."""

PATTERN_SECONDS = 1.0
"""Longest time for matching ``train.grpo.pattern``: some expressions take exponential time."""

Row = Mapping[str, Any]
Reward = Callable[[str, Row], float]


def available() -> list[str]:
    """Returns the names of all rewards: the shipped ones, and those of installed packages."""
    return [*SHIPPED, *sorted(entry_points(group=GROUP).names)]


def needs_reference(name: str) -> bool:
    """Returns whether a shipped reward compares the answer with the row's reference."""
    return name in METRICS and name not in WITHOUT_REFERENCE


@dataclass(kw_only=True)
class Rewards:
    """Scores answers, counts what fails, and never ends a training silently.

    Attributes:
        weights: Weight of each reward by name; 0 logs it only.
        pattern: Regular expression that ``format`` compares the whole answer with.
        target_tokens: Longest answer with the full reward of ``length``.
        limit: Tokens at which ``length`` is 0.
        stops: Whether an error of a reward ends the training; otherwise it counts as ``error_value``.
        error_value: See ``stops``.
        errors: Number of errors by reward.
        first_error: Of each reward, the first error's message.
    """

    weights: Mapping[str, float]
    pattern: str | None = None
    target_tokens: int | None = None
    limit: int = 0
    stops: bool = False
    error_value: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    first_error: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if SANDBOXED in self.weights:
            check_metrics([SANDBOXED])
        self._functions = {name: self._function(name) for name in self.weights if name != LENGTH}

    def score(self, answers: Sequence[str], rows: Sequence[Row], *, tokens: Sequence[int]) -> list[dict[str, float]]:
        """Computes every reward of each answer.

        Args:
            answers: Texts without special tokens.
            rows: Their rows, with ``reference`` and perhaps ``tests``.
            tokens: Length of each answer.

        Raises:
            TrainError: A reward fails, and ``stops`` is set.
        """
        columns: dict[str, list[float]] = {}
        for name in self.weights:
            if name == LENGTH:
                columns[name] = [self._length(count) for count in tokens]
            elif name == SANDBOXED:  # a process each, so threads only wait
                with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                    columns[name] = list(
                        pool.map(lambda pair: self._one(SANDBOXED, *pair), zip(answers, rows, strict=True))
                    )
            else:
                columns[name] = [self._one(name, answer, row) for answer, row in zip(answers, rows, strict=True)]
        return [{name: column[number] for name, column in columns.items()} for number in range(len(answers))]

    def total(self, scores: Mapping[str, float]) -> float:
        """Returns the weighted sum of an answer's rewards."""
        return math.fsum(weight * scores[name] for name, weight in self.weights.items())

    def _one(self, name: str, answer: str, row: Row) -> float:
        try:
            value = float(self._functions[name](answer, row))
            problem = "" if math.isfinite(value) else f"it returned {value}"
        except Exception as error:  # noqa: BLE001 - a reward is a user's code: its error is counted, or stops by name
            problem = f"{type(error).__name__}: {error}"
        if not problem:
            return value
        self.errors[name] += 1
        self.first_error.setdefault(name, f"{problem} (row {row.get('row')}, answer {answer[:60]!r})")
        if self.stops:
            raise TrainError(
                f"train.grpo.rewards: {name} fails: {self.first_error[name]}. Fix the reward, or count errors as "
                "train.grpo.error_value with train.grpo.on_error=value"
            )
        return self.error_value

    def _length(self, tokens: int) -> float:
        """Returns 1 up to ``target_tokens``, falling linearly to 0 at ``limit``."""
        target = self.target_tokens or 0
        return min(1.0, max(0.0, (self.limit - tokens) / max(1, self.limit - target)))

    def _function(self, name: str) -> Reward:
        if name == FORMAT:
            pattern = regex.compile(self.pattern or "", regex.DOTALL)
            return lambda answer, _: float(bool(pattern.fullmatch(answer.strip(), timeout=PATTERN_SECONDS)))
        if name in METRICS:
            return METRICS[name]
        found = entry_points(group=GROUP, name=name)
        if not found:
            raise ConfigError(f"train.grpo.rewards: {name!r} is not one of {', '.join(available())}")
        function: Reward = next(iter(found)).load()
        return function


def column_of(name: str) -> str:
    """Returns the column of a row that a reward reads: ``reference``, ``tests``, or an empty string."""
    return NEEDS.get(name, "reference" if needs_reference(name) else "")
