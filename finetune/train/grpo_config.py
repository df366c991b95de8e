"""Settings of training on rewards of sampled answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import regex

from finetune.rewards import FORMAT, LENGTH, SHIPPED, available

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo", "rloo")
ON_ERROR = ("value", "stop")
LARGEST_TEMPERATURE = 2.0


@dataclass(kw_only=True, slots=True)
class GRPOConfig:
    """Rewards, sampling and loss of ``train.objective=grpo``."""

    rewards: dict[str, float] = field(default_factory=dict)
    """Reward -> weight; an answer's reward is the weighted sum. Metrics of the evaluation (``json_valid``,
    ``json_fields``, ``exact_match``, ``number``, ``label``, ``pass_at_1`` for code in the sandbox, ...), ``length``,
    ``format``, or the name of an entry point of the group ``finetune.rewards``. A weight of 0 only logs a reward."""

    loss: str = "grpo"
    """``grpo``: mean over each answer's tokens, then over answers. ``dapo``: mean over all tokens of a step.
    ``dr_grpo``: advantages not divided by the deviation, sum over tokens divided by ``max_new_tokens``. ``gspo``: one
    ratio for an answer. ``rloo``: each answer against the mean of the others of its group. Every step samples anew, so
    the policy's ratio is 1, and nothing is clipped."""

    group: int = 8
    """Answers sampled for each prompt. ``train.rows_per_step`` counts prompts."""

    max_new_tokens: int = 64
    """Longest answer, the end token included. Longer ones are cut, and counted as ``train/cut``."""

    temperature: float = 1.0
    """Divides the logits, of the sampler and of the loss; above 0, at most 2."""

    top_p: float = 1.0
    """Samples from the most likely tokens with this much probability; 1 for all. The loss does not correct for it."""

    batch_rows: int = 32
    """Answers that are sampled in one batch. It may change a rounding, so it is part of the run: it does not follow
    the free memory. Where memory runs out, it is halved and logged."""

    beta: float = 0.0
    """Weight of the KL divergence to the model without its adapter. At 0 the divergence is only measured: in the
    first step and in those that end with a held-out evaluation."""

    pattern: str | None = None
    """Regular expression that ``format`` compares with the whole answer; ``.`` matches line breaks."""

    target_tokens: int | None = None
    """``length`` is 1 for answers up to this length, and falls to 0 at ``max_new_tokens``."""

    on_error: str = "value"
    """Where a reward raises an error or returns no finite number: ``value`` counts it as ``error_value`` and logs how
    many there were; ``stop`` ends the training with the error's message."""

    error_value: float = 0.0
    """Reward of an answer whose reward failed."""

    def problems(self, *, sampled: bool) -> Iterator[str]:
        """Yields what is wrong.

        Args:
            sampled: Whether the objective samples answers; otherwise only values that differ from the default count.
        """
        where = "train.grpo"
        if not sampled:
            if self != GRPOConfig():
                yield f"{where} has an effect with train.objective=grpo only; choose train=grpo, or remove its settings"
            return
        yield from self._reward_problems()
        for key, allowed in (("loss", LOSSES), ("on_error", ON_ERROR)):
            if (value := getattr(self, key)) not in allowed:
                yield f"{where}.{key} must be one of {', '.join(allowed)}; got {value!r}"
        if self.group < 2:
            yield (
                f"{where}.group must be at least 2: an answer is compared with the others of its prompt, and one alone "
                f"has nothing to learn from; got {self.group}: set it to 8"
            )
        for key in ("max_new_tokens", "batch_rows"):
            if getattr(self, key) < 1:
                yield f"{where}.{key} must be at least 1; got {getattr(self, key)}"
        if not 0 < self.temperature <= LARGEST_TEMPERATURE:
            yield (
                f"{where}.temperature must be above 0 and at most {LARGEST_TEMPERATURE:g}: without randomness all "
                f"answers of a group are the same; got {self.temperature}: set it to 1"
            )
        if not 0 < self.top_p <= 1:
            yield f"{where}.top_p must be above 0 and at most 1; got {self.top_p}: set it to 1 for all tokens"
        if self.beta < 0:
            yield f"{where}.beta must be 0 or more; got {self.beta}"
        if self.beta and self.loss == "rloo":
            yield f"{where}.beta has no effect with loss=rloo; got {self.beta}: set it to 0, or choose loss=grpo"

    def _reward_problems(self) -> Iterator[str]:
        where = "train.grpo"
        if not any(self.rewards.values()):
            yield (
                f"{where}.rewards has no weight other than 0, so nothing is learned; e.g. "
                f"{where}.rewards={{json_valid: 0.2, json_fields: 0.8}}"
            )
        unknown = [name for name in self.rewards if name not in SHIPPED]
        unknown = [name for name in unknown if name not in available()] if unknown else []
        if unknown:
            yield (
                f"{where}.rewards: {', '.join(unknown)} is not known; use {', '.join(available())}, or install a "
                "package with an entry point of that name in the group finetune.rewards"
            )
        if (FORMAT in self.rewards) != (self.pattern is not None):
            yield (
                f"{where}.pattern and the reward {FORMAT} belong together; got {where}.pattern={self.pattern!r} and "
                f"the rewards {', '.join(self.rewards) or 'none'}"
            )
        if self.pattern is not None:
            try:
                regex.compile(self.pattern)
            except regex.error as error:
                yield f"{where}.pattern={self.pattern!r} is not a regular expression: {error}"
        if (LENGTH in self.rewards) != (self.target_tokens is not None):
            yield f"{where}.target_tokens and the reward {LENGTH} belong together; got {self.target_tokens}"
        if self.target_tokens is not None and not 0 < self.target_tokens < self.max_new_tokens:
            yield (
                f"{where}.target_tokens must be above 0 and below {where}.max_new_tokens={self.max_new_tokens}; "
                f"got {self.target_tokens}"
            )
