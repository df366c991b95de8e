"""Answers that the run's own trainer samples before the first step, and what it computes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from finetune.preflight.context import CheckContext

PLANTED_NATS = 1.0
"""How much more likely one step should make a whole answer: far more than rounding, and a small step."""

ANSWERS_OF_A_GROUP = 2
"""Answers of each prompt whose log-probabilities are compared; their prompts have different lengths."""

DIVIDED_ANSWERS = 6
"""Answers whose gradient is computed one by one and as one batch."""


@dataclass(frozen=True, kw_only=True)
class RolloutProbe:
    """What a preflight finds out about sampling and rewards.

    Attributes:
        completions: Answers of the first groups, as the first step would sample them.
        again: The same, sampled a second time.
        rewards_again: Their rewards, computed a second time.
        errors: First error of each reward that failed.
        divergence: Mean estimate of the KL divergence to the reference, nats per token.
        gap: Log-probability of each sampled token under the trainer less that under the sampler, after one step.
        predicted: By how many nats a step along its gradient should raise the log-probability of a good answer.
        gained: By how many it did.
        divided: Relative difference of the gradients of answers one by one and as one batch.
    """

    completions: list[Any]
    again: list[Any]
    rewards_again: list[dict[str, float]]
    errors: dict[str, str]
    divergence: float
    gap: Tensor
    predicted: float
    gained: float
    divided: float

    @property
    def groups(self) -> list[list[float]]:
        """Returns the rewards by group."""
        groups: dict[int, list[float]] = {}
        for item in self.completions:
            groups.setdefault(item.row, []).append(item.reward)
        return list(groups.values())


def probe(context: CheckContext) -> RolloutProbe:
    """Samples and scores the answers of the first prompts with the run's own trainer; the model stays as it was."""
    with context.trainer.made(context.rows.micro_batch) as trainer:
        rows = [row for batch in trainer.get_train_dataloader() for row in batch["prompts"]]
        completions = trainer.roll_out(rows).completions
        texts, tokens = [item.text for item in completions], [len(item.sample.tokens) for item in completions]
        rewards_again = trainer.rewards.score(texts, rows, tokens=tokens)
        policy = log_probabilities(trainer, completions)
        with torch.no_grad(), context.model.disable_adapter():
            reference = log_probabilities(trainer, completions)
        ratio = (reference - policy).double()
        again = trainer.roll_out(rows[: trainer.grpo.group]).completions
        predicted, gained = plant(trainer, completions[0])  # from here on, the adapter is off zero
        moved = trainer.roll_out(rows[:: max(1, trainer.grpo.group // ANSWERS_OF_A_GROUP)]).completions
        sampled = torch.tensor([value for item in moved for value in item.sample.logprobs])
        gap = log_probabilities(trainer, moved) - sampled
        divided = compare_divided(trainer, moved[:DIVIDED_ANSWERS])
        (context.folder.parent / "trained_text.txt").write_text("\n\n".join(texts), encoding="utf-8")
        return RolloutProbe(
            completions=completions,
            again=again,
            rewards_again=rewards_again,
            errors=dict(trainer.rewards.first_error),
            divergence=float((ratio.exp() - ratio - 1).mean()),
            gap=gap,
            predicted=predicted,
            gained=gained,
            divided=divided,
        )


def inputs_of(trainer: Any, completions: Sequence[Any]) -> dict[str, Any]:
    """Returns a micro-batch of answers on the trainer's device."""
    batch = trainer.data_collator.collate.answers(completions)
    prepared: dict[str, Any] = trainer._prepare_inputs(batch)
    return {name: value for name, value in prepared.items() if name not in ("padding", "rows")}


def log_probabilities(trainer: Any, completions: Sequence[Any]) -> Tensor:
    """Computes the log-probability of every sampled token as a training step does, shape (tokens,)."""
    size, parts = trainer.args.per_device_train_batch_size, []
    trainer.model.train()
    for start in range(0, len(completions), size):
        inputs = inputs_of(trainer, completions[start : start + size])
        for name in ("answer_tokens", "advantages", "sampled"):
            inputs.pop(name)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            parts.append(trainer.log_probabilities(trainer.model, inputs).cpu())
    return torch.cat(parts)


def gradient(trainer: Any, completions: Sequence[Any], *, micro_batch: int, size: int) -> list[Tensor]:
    """Computes the gradient of the trainer's loss over some answers."""
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)
    for start in range(0, len(completions), micro_batch):
        inputs = inputs_of(trainer, completions[start : start + micro_batch])
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=size)
        loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in trainable]
    trainer.model.zero_grad(set_to_none=True)
    return found


def compare_divided(trainer: Any, completions: Sequence[Any]) -> float:
    """Returns how much the gradient changes when answers are computed one by one, with every second one rewarded."""
    for number, item in enumerate(completions):
        item.advantage = 1.0 - 2.0 * (number % 2)
    size = trainer.step_size(completions)
    alone, together = (gradient(trainer, completions, micro_batch=count, size=size) for count in (1, len(completions)))
    distance = sum(float((a - b).double().square().sum()) for a, b in zip(alone, together, strict=True)) ** 0.5
    return distance / max(1e-30, sum(float(b.double().square().sum()) for b in together) ** 0.5)


def plant(trainer: Any, completion: Any) -> tuple[float, float]:
    """Takes one step in which only this answer is good.

    Returns:
        The gain in its log-probability that the gradient predicts, and the gain, in nats.
    """
    completion.advantage = 1.0
    before = float(log_probabilities(trainer, [completion]).sum())
    tokens = len(completion.sample.tokens)
    downhill = gradient(trainer, [completion], micro_batch=1, size=1)
    steepness = sum(float(part.double().square().sum()) for part in downhill)
    if not steepness:
        return PLANTED_NATS, 0.0
    whole = 1 if trainer.grpo.loss in ("dapo", "dr_grpo", "rloo") else tokens  # others average over the answer's tokens
    rate = PLANTED_NATS / (steepness * whole)
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter, part in zip(trainable, downhill, strict=True):
        parameter.data.sub_(rate * part)
    return PLANTED_NATS, float(log_probabilities(trainer, [completion]).sum()) - before
