"""The trainer of KTO and APO-zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from finetune.launch.gradients import all_reduce_gradients
from finetune.memory import is_out_of_memory
from finetune.train import kto
from finetune.train.preference import token_losses
from finetune.train.sft_trainer import EVALUATION_BATCH_TOKENS, Trainer


class KTOTrainer(Trainer):
    """Trains on labelled answers; the reference is the model with its adapter switched off."""

    sums: Any = 0.0
    """`kto.figures` since the loss was last logged."""

    point: float = 0.0
    """z0 of the accumulated step, over all processes."""

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Reads the micro-batches of a step, and computes its reference point from all of them."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        wrong = [batch.pop("mismatched", None) for batch in batches]
        if self.job.config.preference.loss != kto.APO_ZERO:
            self.point = self._reference_point([batch for batch in wrong if batch])
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
        """Counts the answers of the accumulated step: as labels with one entry per answer."""
        answers = [{"labels": None, "shift_labels": batch["answer_tokens"]} for batch in batch_samples]
        return super()._get_num_items_in_batch(answers, device)

    def _reference_point(self, batches: list[dict[str, Any]]) -> float:
        """Computes z0: the mean log-ratio of the mismatched answers, at least 0."""
        model: Any = self.model
        model.train()
        total, count, failed = 0.0, 0, ""
        for batch in batches:
            inputs = {name: value for name, value in self._prepare_inputs(batch).items() if name != "padding"}
            try:
                with torch.no_grad(), self.compute_loss_context_manager():
                    policy, reference, _ = self._log_probabilities(model, inputs)
            except (RuntimeError, MemoryError) as error:
                if self.ranks.count == 1 or not is_out_of_memory(error):
                    raise
                failed = str(error) or type(error).__name__
                break
            total, count = total + float((policy - reference).double().sum()), count + len(policy)
        figures = [total, float(count)]
        if self.ranks.count > 1:
            figures = all_reduce_gradients([], figures, device=str(self.args.device))
        self.out_of_memory = failed or self.out_of_memory  # raised before the optimizer, when all processes know of it
        return max(0.0, figures[0] / figures[1]) if figures[1] else 0.0

    def _log_probabilities(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Returns each answer's log-probability under policy and reference, and its tokens, all of shape (answers,)."""
        batch, adapted = dict(inputs), self.accelerator.unwrap_model(model)
        tokens = batch.pop("answer_tokens")
        with torch.no_grad(), adapted.disable_adapter():
            reference = kto.sums(token_losses(model, adapted, batch, self.fusion), tokens)
        return kto.sums(token_losses(model, adapted, batch, self.fusion), tokens), reference, tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss, divided by ``num_items_in_batch``, the answers of the whole accumulated step."""
        batch, config = dict(inputs), self.job.config.preference
        desirable = batch.pop("desirable")
        policy, reference, tokens = self._log_probabilities(model, batch)
        ratios = policy - reference
        self.sums = self.sums + kto.figures(policy, ratios, desirable, tokens, point=self.point, beta=config.beta)
        return kto.answer_losses(ratios, desirable, self.point, config).sum() / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures since the last logged loss."""
        if "loss" in logs:
            sums = self.sums.tolist()
            if self.ranks.count > 1:
                sums = all_reduce_gradients([], sums, device=str(self.args.device))
            logs |= kto.named(torch.tensor(sums, dtype=torch.float64), prefix="train")
            self.sums = 0.0
        super().log(logs, start_time)

    def held_out_figures(self, model: Any) -> dict[str, float]:
        """Computes the mean loss of the held-out answers, and the rewards of both kinds."""
        config = self.job.config.preference
        return kto.held_out_figures(model, self.held_out, config, batch_tokens=EVALUATION_BATCH_TOKENS)
