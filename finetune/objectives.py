"""The training objectives: one table of the rows that each reads and of what it compares.

    objective = OBJECTIVES["dpo"]
    objective.rows, objective.pairs, objective.reference  # "preference", True, True

Everything that depends on the objective outside ``train/`` asks this table: configuration, data, plan, preflight,
report. It imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SUPERVISED, PREFERENCE, UNPAIRED, PROMPT = "supervised", "preference", "unpaired", "prompt"

FORMATS_OF_ROWS = {
    PREFERENCE: ("preference",),
    UNPAIRED: ("unpaired", "preference"),
    PROMPT: ("prompt", "prompt_completion", "alpaca", "messages", "sharegpt", "guanaco"),
}
"""The row formats that each ``data.objective`` can use; ``supervised`` reads all but ``prompt``. A pair is two labelled
answers; the last answer of a conversation is the reference of its prompt."""

EXAMPLES = {
    PREFERENCE: '{"prompt", "chosen", "rejected"}, data=preference',
    UNPAIRED: '{"prompt", "completion", "label": true or false}, data=unpaired',
    PROMPT: '{"prompt", "reference"}, perhaps with "tests", data=prompts',
}
"""A row of each, and the option that reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Properties of one training objective.

    Attributes:
        rows: ``data.objective``: the prepared rows that it trains on.
        unit: What the loss of a step is averaged over: ``token``, ``pair``, ``answer`` or ``completion``, an answer
            that the model samples itself.
        reference: Whether it compares the model with itself without the adapter.
        per_token: Whether it compares means over an answer's tokens instead of their sums.
        extra_passes: Forward passes over each row without a gradient.
        shardable: Whether it trains with weights in shards (launch=fsdp, launch=deepspeed).
        losses: Values that ``train.preference.loss`` may have.
        settings: Fields of ``train.preference`` that it uses.
    """

    rows: str = PREFERENCE
    unit: str = "pair"
    reference: bool = False
    per_token: bool = False
    extra_passes: int = 0
    shardable: bool = True
    losses: tuple[str, ...] = ("sigmoid",)
    settings: tuple[str, ...] = ()

    @property
    def pairs(self) -> bool:
        """Returns whether a row is a chosen and a rejected answer."""
        return self.unit == "pair"

    @property
    def samples(self) -> bool:
        """Returns whether it trains on answers that the model samples from prompts."""
        return self.unit == "completion"

    @property
    def compares(self) -> bool:
        """Returns whether it weighs complete answers: these are never packed, and only the last turn is trained on."""
        return self.unit != "token"

    def passes_without_gradient(self, loss: str) -> int:
        """Returns the forward passes over each row that need no gradient; ``apo_zero`` has no mismatched answers."""
        return 1 if loss == "apo_zero" else self.extra_passes


OBJECTIVES = {
    "sft": Objective(rows=SUPERVISED, unit="token"),
    "dpo": Objective(
        reference=True,
        extra_passes=1,
        losses=("sigmoid", "ipo", "hinge"),
        settings=("beta", "loss", "label_smoothing"),
    ),
    "orpo": Objective(per_token=True, settings=("beta", "likelihood")),
    "simpo": Objective(per_token=True, settings=("beta", "margin", "label_smoothing", "likelihood")),
    "cpo": Objective(losses=("sigmoid", "hinge"), settings=("beta", "loss", "label_smoothing", "likelihood")),
    "kto": Objective(
        rows=UNPAIRED,
        unit="answer",
        reference=True,
        extra_passes=3,
        shardable=False,
        losses=("kto", "apo_zero"),
        settings=("beta", "loss", "desirable_weight", "undesirable_weight"),
    ),
    "grpo": Objective(rows=PROMPT, unit="completion", reference=True, extra_passes=1, shardable=False),
}


def rows_mismatch(name: str, rows: str) -> Iterator[str]:
    """Yields the problem of an objective with the prepared rows of another one, each with what to change.

    Args:
        name: ``train.objective``, in `OBJECTIVES`.
        rows: ``data.objective``.
    """
    needed = OBJECTIVES[name].rows
    if rows == needed:
        return
    others = " or ".join(f"train={other}" for other, objective in OBJECTIVES.items() if objective.rows == rows)
    fitting = f"for {EXAMPLES[rows]} choose {others}; " if rows in EXAMPLES else ""
    yield (
        f"train.objective={name} trains on data.objective={needed}; got {rows}: "
        f"{fitting}{'or ' if fitting else ''}set data.objective={needed}{_wanted(needed)}"
    )


def format_problem(rows: str, name: str, *, where: str) -> str | None:
    """Returns why rows of a format cannot serve a ``data.objective``, and what to change; None where they can.

    Args:
        rows: ``data.objective``.
        name: The format, not ``auto``.
        where: What has that format.
    """
    if rows == SUPERVISED and name == PROMPT:
        return (
            f"data.objective={rows}: {where} has the format prompt, whose rows may be without an answer; set "
            "data.objective=prompt train=grpo, or data.format=prompt_completion with a column of answers"
        )
    if name in FORMATS_OF_ROWS.get(rows, (name,)):
        return None
    if rows == PROMPT:
        return (
            f"data.objective={rows}: {where} has the format {name}, whose rows have no prompt with one reference; use "
            f"rows like {EXAMPLES[rows]}, or set data.objective={SUPERVISED} train=default"
        )
    remedy = f"use rows like {EXAMPLES[rows]}, or set data.objective={SUPERVISED} train=default"
    if name == UNPAIRED:
        fitting = " or ".join(f"train={other}" for other, item in OBJECTIVES.items() if item.rows == UNPAIRED)
        remedy = f"single answers with a label are for data.objective={UNPAIRED} {fitting}; or {remedy}"
    return f"data.objective={rows}: {where} has the format {name} without rejected answers; {remedy}"


def _wanted(rows: str) -> str:
    return f", with rows like {EXAMPLES[rows]}" if rows in EXAMPLES else ""
