"""The trainer of preference objectives."""

from __future__ import annotations

from typing import Any

import torch

from finetune.launch.gradients import all_reduce_gradients
from finetune.train import preference
from finetune.train.sft_trainer import EVALUATION_BATCH_TOKENS, Trainer


class PreferenceTrainer(Trainer):
    """Trains on pairs with DPO's loss; the reference is the model with its adapter switched off."""

    sums: Any = 0.0
    """`preference.figures` since the loss was last logged."""

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
        """Counts the pairs of the accumulated step: as labels with one entry per pair, which transformers counts."""
        pairs = [{"labels": None, "shift_labels": batch["answer_tokens"].chunk(2)[0]} for batch in batch_samples]
        return super()._get_num_items_in_batch(pairs, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss, divided by ``num_items_in_batch``, the pairs of the whole accumulated step."""
        batch, config = dict(inputs), self.job.config.preference
        tokens = batch.pop("answer_tokens")
        adapted = self.accelerator.unwrap_model(model)
        with torch.no_grad(), adapted.disable_adapter():
            losses = preference.token_losses(model, adapted, batch, self.fusion)
            reference = preference.answer_logprobs(losses, tokens)
        policy = preference.answer_logprobs(preference.token_losses(model, adapted, batch, self.fusion), tokens)
        self.sums = self.sums + preference.figures(policy, reference, beta=config.beta)
        return preference.pair_losses(policy - reference, tokens, config).sum() / num_items_in_batch

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
            logs |= preference.named(torch.tensor(sums, dtype=torch.float64), prefix="train")
            self.sums = 0.0
        super().log(logs, start_time)

    def held_out_figures(self, model: Any) -> dict[str, float]:
        """Computes the mean loss of the held-out pairs, and how often the chosen answer wins."""
        return preference.held_out_figures(
            model, self.held_out, self.job.config.preference, batch_tokens=EVALUATION_BATCH_TOKENS
        )
