"""KTO and APO-zero: single answers labelled desirable or undesirable, compared with the reference.

KTO's reference point z0 is the mean log-ratio of policy and reference over mismatched pairs: a row's prompt with the
answer of another row. That other row is chosen once for the whole data set, so a step does not depend on how its rows
are divided among micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import TrainError
from finetune.inference.rows import IGNORED
from finetune.train.pair_losses import bounds
from finetune.train.preference import answer_start, as_document
from finetune.train.preference_config import PreferenceConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

FIGURES = ("desirable_reward", "undesirable_reward", "reward_accuracy", "chosen_logprob_per_token", "kl")
APO_ZERO = "apo_zero"
MISMATCHED = "mismatched"
"""Number of the row whose answer follows this row's prompt; -1 for none."""

SEARCHED_ROWS = 64
"""Rows before a row among which an answer for its prompt is looked for."""


@dataclass(frozen=True, slots=True)
class AnswerCollator:
    """Makes micro-batches of single answers, each a document with its prompt.

    Attributes:
        flat: Concatenates all documents in one row, as `finetune.inference.collate.Collator` does.
        pad_token_id: Pads the rows.
        rows: All rows, in which the mismatched answers are looked up; None without a reference point.
    """

    flat: bool
    pad_token_id: int
    rows: Any = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collates answers.

        Returns:
            The keys of `Collator`; ``answer_tokens``: trained tokens of each answer, shape (answers,); ``desirable``:
            shape (answers,); ``mismatched``: a micro-batch of prompts with other rows' answers, None without any.
        """
        import torch

        wrong = [] if self.rows is None else [row for row in rows if row.get(MISMATCHED, -1) >= 0]
        wrong = [mismatched(row, self.rows[row[MISMATCHED]]) for row in wrong]
        return {
            **self._batch([as_document(row["input_ids"], row["labels"]) for row in rows]),
            "desirable": torch.tensor([bool(row["desirable"]) for row in rows]),
            "mismatched": self._batch(wrong) if wrong else None,
        }

    def _batch(self, documents: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        from finetune.inference.collate import Collator

        tokens = [sum(label != IGNORED for label in document["labels"]) for document in documents]
        batch = Collator(flat=self.flat, pad_token_id=self.pad_token_id)(documents)
        return {**batch, "answer_tokens": torch.tensor(tokens)}


def mismatched(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns the prompt of a row with the answer of another one, as a document."""
    start, answer = answer_start(row["labels"]), answer_start(other["labels"])
    ids = row["input_ids"][:start] + other["input_ids"][answer:]
    return {"input_ids": ids, "labels": [IGNORED] * start + other["labels"][answer:], "seq_lengths": [len(ids)]}


def choose_mismatched(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Chooses for each row another one whose answer follows its prompt: the nearest earlier one, around the end.

    It has another prompt, and together they are no longer than the longest row. -1 where none of `SEARCHED_ROWS` is.
    """
    starts = [answer_start(row["labels"]) for row in rows]
    prompts = [hash(tuple(row["input_ids"][:start])) for row, start in zip(rows, starts, strict=True)]
    sizes = [len(row["input_ids"]) for row in rows]
    longest = max(sizes, default=0)
    chosen = []
    for number, start in enumerate(starts):
        candidates = ((number - back) % len(rows) for back in range(1, min(SEARCHED_ROWS, len(rows) - 1) + 1))
        fitting = (
            other
            for other in candidates
            if prompts[other] != prompts[number] and 0 < sizes[other] - starts[other] <= longest - start
        )
        chosen.append(next(fitting, -1))
    return chosen


def training_answers(rows: Dataset) -> tuple[Dataset, float]:
    """Returns the rows of data/train whose answer is trained on, with `MISMATCHED`, and logs how many are not.

    Returns:
        Those rows, and their mean number of tokens.

    Raises:
        TrainError: None of the rows has a trained token.
    """
    read = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    usable = [number for number, row in enumerate(read) if answer_start(row["labels"]) < len(row["labels"])]
    if not usable:
        raise TrainError(
            f"train: none of the {len(rows):,} training answers has a trained token; raise data.max_tokens, or use "
            "data.too_long=truncate_prompt"
        )
    if len(usable) < len(rows):
        left_out = len(rows) - len(usable)
        log("train", f"leaves out {left_out:,} of {len(rows):,} answers: none of their tokens is trained")
    others = choose_mismatched(read)
    missing = sum(others[number] < 0 for number in usable)
    if missing:
        log(
            "train",
            f"{missing:,} of {len(usable):,} prompts have no other row's answer for the reference point (KTO's z0): "
            f"none of the {SEARCHED_ROWS} rows before has another prompt and fits the longest row",
        )
    tokens = sum(len(read[number]["input_ids"]) for number in usable)
    return rows.add_column(MISMATCHED, others).select(usable), tokens / len(usable)


def answers_with_tokens(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the held-out rows whose answer has a trained token, and logs how many have none."""
    usable = [row for row in rows if answer_start(row["labels"]) < len(row["labels"])]
    if len(usable) < len(rows):
        log("train", f"held-out loss on {len(usable):,} of {len(rows):,} answers; the others have no trained token")
    return usable


def log_weights(desirable: Sequence[int], config: PreferenceConfig) -> None:
    """Logs how the weights of both kinds compare with what the authors advise."""
    good, all_answers = sum(desirable), len(desirable)
    if 0 < good < all_answers:
        ratio = config.desirable_weight * good / (config.undesirable_weight * (all_answers - good))
        even = config.desirable_weight / ratio
        advice = "" if 1 <= ratio <= 4 / 3 else f"; train.preference.desirable_weight={even:.2g} makes it 1"
        log("train", f"desirable to undesirable answers, times their weights: {ratio:.2f} (advised: 1 to 1.33){advice}")


def sums(losses: Tensor, answer_tokens: Tensor) -> Tensor:
    """Sums the log-probability of each answer, shape (answers,), from the losses of all trained tokens."""
    import torch

    return torch.stack([-part.sum() for part in losses.float().split(answer_tokens.tolist())])


def answer_losses(ratios: Tensor, desirable: Tensor, point: Tensor | float, config: PreferenceConfig) -> Tensor:
    """Computes the loss of each answer, shape (answers,).

    Args:
        ratios: Log-probability under the policy minus that under the reference, shape (answers,).
        desirable: Shape (answers,), boolean.
        point: z0, at least 0 and without a gradient; 0 for ``apo_zero``.
        config: beta and the weights.

    Source: arXiv 2402.01306, equations 7 and 8; 2408.06266 (apo_zero).
    """
    import torch

    signs = torch.where(desirable, 1.0, -1.0)
    weights = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
    return weights * torch.sigmoid(-config.beta * signs * (ratios - point))


def figures(
    policy: Tensor, ratios: Tensor, desirable: Tensor, answer_tokens: Tensor, *, point: Tensor | float, beta: float
) -> Tensor:
    """Sums the logged figures: desirable and undesirable answers, then `FIGURES`, shape (7,).

    Args:
        policy: Log-probabilities under the policy, shape (answers,).
        ratios: See `answer_losses`.
        desirable: Shape (answers,), boolean.
        answer_tokens: Trained tokens of each answer, shape (answers,).
        point: z0, which counts once for each answer.
        beta: Scale of the rewards.
    """
    import torch

    good, ratios = desirable, ratios.detach()
    right = (ratios > point) == good
    parts = [good, ~good, beta * ratios * good, beta * ratios * ~good, right, policy.detach() / answer_tokens * good]
    total = torch.stack([part.double().sum() for part in parts])
    return torch.cat([total.cpu(), torch.tensor([float(point) * len(good)]).double()])


def named(sums: Tensor, *, prefix: str) -> dict[str, float]:
    """Returns the means by name, e.g. ``train/desirable_reward``; what has no answers is left out."""
    good, bad, *rest = sums.tolist()
    counts = (good, bad, good + bad, good, good + bad)
    shown = {name: value / count for name, value, count in zip(FIGURES, rest, counts, strict=True) if count}
    if good and bad:
        shown["reward_margin"] = shown["desirable_reward"] - shown["undesirable_reward"]
    return {f"{prefix}/{name}": value for name, value in shown.items()}


def held_out_figures(
    model: Any, rows: Sequence[dict[str, Any]], config: PreferenceConfig, *, batch_tokens: int
) -> dict[str, float]:
    """Computes the mean loss of held-out answers, as ``eval_loss``, and the logged figures, two of them with intervals.

    Args:
        model: The peft model.
        rows: With ``desirable``, each with a trained answer; the reference point is that of all of them.
        config: Form and strength.
        batch_tokens: Padded tokens per forward pass.
    """
    import torch

    from finetune.inference.bootstrap import RESAMPLES, Bootstrap, Ratio, mean_of
    from finetune.inference.losses import row_losses

    documents = [as_document(row["input_ids"], row["labels"]) for row in rows]
    others = [] if config.loss == APO_ZERO else choose_mismatched(rows)
    documents += [mismatched(row, rows[other]) for row, other in zip(rows, others, strict=False) if other >= 0]
    adapted = row_losses(model, documents, batch_tokens=batch_tokens)
    with model.disable_adapter():
        base = row_losses(model, documents, batch_tokens=batch_tokens)
    policy, reference = (torch.tensor([-row.loss for row in part]) for part in (adapted, base))
    ratios, count = policy - reference, len(rows)
    point = float(ratios[count:].mean().clamp(min=0)) if len(ratios) > count else 0.0
    desirable = torch.tensor([bool(row["desirable"]) for row in rows])
    loss = answer_losses(ratios[:count], desirable, point, config).mean()
    tokens = torch.tensor([row.tokens for row in adapted[:count]])
    shown = figures(policy[:count], ratios[:count], desirable, tokens, point=point, beta=config.beta)
    resampled, given = Bootstrap(count, samples=RESAMPLES, seed=1), config.beta * ratios[:count].double()
    right = ((ratios[:count] > point) == desirable).double()
    found = {"eval_loss": float(loss), **named(shown, prefix="eval")}
    found |= bounds("eval/reward_accuracy", resampled.level(mean_of(right.tolist())))
    if "eval/reward_margin" in found:
        good, bad = (Ratio((given * kind).numpy(), kind.double().numpy()) for kind in (desirable, ~desirable))
        found |= bounds("eval/reward_margin", resampled.difference(bad, good))
    return found
