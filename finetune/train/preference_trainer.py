"""The trainer of objectives that compare pairs of answers."""

from __future__ import annotations

from typing import Any

import torch

from finetune.launch.gradients import all_reduce_gradients
from finetune.objectives import OBJECTIVES
from finetune.train import pair_losses, preference
from finetune.train.sft_trainer import EVALUATION_BATCH_TOKENS, Trainer


class PreferenceTrainer(Trainer):
    """Trains on pairs of answers; the reference, where there is one, is the model with its adapter switched off."""

    sums: Any = 0.0
    """`pair_losses.figures` since the loss was last logged."""

    step_chosen_tokens: Any = 1
    """Trained tokens of the chosen answers of the accumulated step, over all processes."""

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
        """Counts the pairs of the accumulated step: as labels with one entry per pair, which transformers counts."""
        chosen = [batch["answer_tokens"].chunk(2)[0] for batch in batch_samples]
        if self.job.config.preference.likelihood:
            self.step_chosen_tokens = self._count([tokens.new_zeros(int(tokens.sum())) for tokens in chosen], device)
        return self._count(chosen, device)

    def _count(self, entries: list[Any], device: Any) -> Any:
        batches = [{"labels": None, "shift_labels": labels} for labels in entries]
        return super()._get_num_items_in_batch(batches, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss, divided by ``num_items_in_batch``, the pairs of the whole accumulated step."""
        batch, config, name = dict(inputs), self.job.config.preference, self.job.config.objective
        tokens, reference = batch.pop("answer_tokens"), None
        adapted = self.accelerator.unwrap_model(model)
        if OBJECTIVES[name].reference:
            with torch.no_grad(), adapted.disable_adapter():
                losses = preference.token_losses(model, adapted, batch, self.fusion)
                reference = preference.answer_logprobs(losses, tokens)
        policy = preference.answer_logprobs(preference.token_losses(model, adapted, batch, self.fusion), tokens)
        rewards = pair_losses.rewards(name, policy, reference, tokens, config)
        self.sums = self.sums + pair_losses.figures(policy, rewards, tokens)
        scores = pair_losses.answer_scores(name, policy, reference, tokens)
        loss = pair_losses.pair_losses(scores, tokens, config, name=name).sum() / num_items_in_batch
        if config.likelihood:
            loss = loss - config.likelihood * policy[0].sum() / self.step_chosen_tokens
        return loss

    def join_collectives(self, model: Any, inputs: dict[str, Any]) -> None:
        before = self.sums
        super().join_collectives(model, inputs)
        self.sums = before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the preference figures since the last logged loss."""
        if "loss" in logs:
            sums = self.sums.tolist()
            if self.ranks.count > 1:
                sums = all_reduce_gradients([], sums, device=str(self.args.device))
            logs |= pair_losses.named(torch.tensor(sums, dtype=torch.float64), prefix="train")
            self.sums = 0.0
        super().log(logs, start_time)

    def held_out_figures(self, model: Any) -> dict[str, float]:
        """Computes the mean loss of the held-out pairs, and how often the chosen answer wins."""
        config = self.job.config
        return pair_losses.held_out_figures(
            model, self.held_out, config.preference, name=config.objective, batch_tokens=EVALUATION_BATCH_TOKENS
        )
