"""TRL's SFTTrainer with every setting explicit. Only this file, arguments.py and grpo_trainer.py import trl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from trl import SFTTrainer

from finetune.inference.losses import mean_loss
from finetune.inference.rows import IGNORED
from finetune.launch.gradients import all_reduce_gradients
from finetune.memory import is_out_of_memory
from finetune.optim import make_optimizer, start_above_zero
from finetune.train.distributed import distributed_row_losses
from finetune.train.sampler import StepBatchSampler

if TYPE_CHECKING:
    from finetune.launch.ranks import Ranks
    from finetune.preflight.trial import GradientRecorder
    from finetune.train.guard import NonFiniteGuard
    from finetune.train.progress import TrainingProgress
    from finetune.trainable import TrainingJob

EVALUATION_BATCH_TOKENS = 2048


class Loader(DataLoader[Any]):
    """Passes the epoch to the batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; transformers calls this before each pass."""
        assert isinstance(self.batch_sampler, StepBatchSampler)
        self.batch_sampler.set_epoch(epoch)


class Trainer(SFTTrainer):
    """Counts tokens, and takes the held-out loss per token as every other stage does.

    With several processes, each computes the gradient of its own rows, and `_clip_grad_norm` sums them. The model needs
    no wrapper: the loss of a step is a sum over its trained tokens, divided by their number over all processes.

    Args:
        job: Model, rows and settings.
        progress: Receives the counted tokens.
        guard: Gets every loss, and the gradients before the optimizer.
        sampler: Order of the rows.
        held_out: Rows of the evaluations during training.
        ranks: This process and the others.
        arguments: Of `SFTTrainer`.
    """

    def __init__(
        self,
        job: TrainingJob,
        *,
        progress: TrainingProgress,
        guard: NonFiniteGuard | GradientRecorder,
        sampler: StepBatchSampler,
        held_out: list[dict[str, Any]],
        ranks: Ranks,
        **arguments: Any,
    ) -> None:
        self.job, self.fusion, self.progress, self.guard = job, job.trainable.fusion, progress, guard
        self.sampler, self.held_out, self.ranks = sampler, held_out, ranks
        self.step_tokens, self.step_trained = 0, 0
        self.out_of_memory: str | None = None
        super().__init__(model=job.trainable.model, processing_class=job.trainable.tokenizer, **arguments)
        if self.aux_loss_enabled:  # TRL asks for it in each training step; when generating, the mask has another shape
            job.trainable.model.config.get_text_config().output_router_logits = False

    def get_train_dataloader(self) -> Any:
        """Returns a plain data loader: accelerate's gives each process whole micro-batches, and repeats rows."""
        rows: Any = self.train_dataset
        pin_memory = self.args.dataloader_pin_memory
        return Loader(rows, batch_sampler=self.sampler, collate_fn=self.collate, pin_memory=pin_memory)

    def collate(self, rows: list[dict[str, Any]]) -> Any:
        """Makes a micro-batch; without rows, one that trains nothing and is not computed."""
        if rows:
            return self.data_collator(rows)
        nothing = torch.full((1, 1), IGNORED)
        dataset: Any = self.train_dataset
        empty = {"input_ids": nothing, "labels": nothing, "padding": 1, "rows": [], "answer_tokens": nothing[0, :0]}
        return empty | ({"substitute": self.data_collator([dataset[0]])} if self.ranks.shards else {})

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        labels = inputs["labels"]
        self.step_tokens += labels.numel() - inputs.pop("padding")
        self.step_trained += int((labels != IGNORED).sum())
        rows = inputs.pop("rows")
        if "substitute" in inputs:
            self.join_collectives(model, inputs["substitute"])
        if not rows or self.out_of_memory:
            return torch.zeros((), device=self.args.device)
        try:
            loss = super().training_step(model, inputs, *arguments, **keywords)
        except (RuntimeError, MemoryError) as error:
            if self.ranks.count == 1 or self.ranks.shards or not is_out_of_memory(error):
                raise
            self.out_of_memory = str(error) or type(error).__name__  # raised when all processes know of it
            return torch.zeros((), device=self.args.device)
        loss = self.guard.record_loss(loss, rows=rows, inputs=inputs)
        return loss * self.ranks.count  # transformers logs the mean over processes

    def join_collectives(self, model: Any, inputs: dict[str, Any]) -> None:
        """Computes a micro-batch with zero gradients: the other processes need this one's part of each layer."""
        prepared = self._prepare_inputs(inputs)
        computed = {name: value for name, value in prepared.items() if name not in ("padding", "rows")}
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, computed, num_items_in_batch=1)
        (0.0 * loss).backward()

    def _clip_grad_norm(self, model: Any) -> Any:
        figures = [float(self.step_tokens), float(self.step_trained), float(self.out_of_memory is not None)]
        self.step_tokens = self.step_trained = 0
        if self.ranks.count > 1:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            figures = all_reduce_gradients(trainable, figures, device=str(self.args.device))
        tokens, trained, failed = (int(figure) for figure in figures)
        if failed:
            raise MemoryError(self.out_of_memory or f"on {failed} of {self.ranks.count} processes")
        self.progress.tokens += tokens
        self.progress.trained += trained
        return self.guard.clip_gradients(self, model, max_norm=self.args.max_grad_norm)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.job.optim, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Creates transformers' schedule, with a first step above 0."""
        new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if new:
            start_above_zero(scheduler, rising=self.args.get_warmup_steps(num_training_steps))
        return scheduler

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Returns accelerate's autocast; accelerate applies it to the model's own forward pass only."""
        return self.accelerator.autocast()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss, divided by ``num_items_in_batch``, the trained tokens of the whole accumulated step."""
        if self.fusion.loss_on_trained_tokens:
            return self.fusion.loss(self.accelerator.unwrap_model(model), inputs) / num_items_in_batch
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss / self.ranks.count  # transformers multiplies by the processes, for gradients that are averaged

    def held_out_figures(self, model: Any) -> dict[str, float]:
        """Computes nats per trained token over the held-out rows; transformers' own mean weighs batches, not tokens."""
        losses = distributed_row_losses(model, self.held_out, batch_tokens=EVALUATION_BATCH_TOKENS, ranks=self.ranks)
        return {"eval_loss": mean_loss(losses)}

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Computes and logs the held-out figures."""
        if not self.held_out:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        metrics = self.held_out_figures(model)
        model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes nothing: the export stage writes the model card, with results in it."""
