"""TRL's SFTTrainer with every setting explicit. The only importer of trl, with arguments.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import load_from_disk
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from finetune.console import log
from finetune.inference.collate import Collator
from finetune.inference.losses import mean_loss
from finetune.inference.rows import IGNORED, read_rows
from finetune.launch.gradients import all_reduce_gradients
from finetune.lora import cast_adapter
from finetune.optim import make_optimizer
from finetune.train import preference
from finetune.train.arguments import refuse_idle, rows_per_step, sft_config, step_count
from finetune.train.distributed import distributed_row_losses, prepare_distributed
from finetune.train.guard import CollatorWithRowIds
from finetune.train.oom_retry import is_out_of_memory
from finetune.train.sampler import StepBatchSampler, micro_batches

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from finetune.launch.ranks import Ranks
    from finetune.preflight.trial import GradientRecorder
    from finetune.train.guard import NonFiniteGuard
    from finetune.train.progress import TrainingProgress
    from finetune.trainable import TrainingJob

EVALUATION_BATCH_TOKENS = 2048


class Loader(DataLoader[Any]):
    """Tells the order of the rows which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        """transformers calls it before each pass."""
        assert isinstance(self.batch_sampler, StepBatchSampler)
        self.batch_sampler.set_epoch(epoch)


class Trainer(SFTTrainer):
    """Counts tokens, and takes the held-out loss by token as every other stage does.

    Of several processes, each computes the gradient of its own rows; `_clip_grad_norm` sums them. The model is not
    wrapped for it: the loss of a step is a sum over its trained tokens, divided by their number over all processes.

    Args:
        job: Model, rows and settings.
        progress: Receives the counted tokens.
        guard: Sees every loss, and the gradients before the optimizer.
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
        self.own_tokens, self.own_trained = 0, 0
        self.out_of_memory: str | None = None
        super().__init__(model=job.trainable.model, processing_class=job.trainable.tokenizer, **arguments)

    def get_train_dataloader(self) -> Any:
        """Not accelerate's: that one would deal out whole micro-batches, and repeat rows where they do not come out even."""
        rows: Any = self.train_dataset
        return Loader(
            rows, batch_sampler=self.sampler, collate_fn=self.collated, pin_memory=self.args.dataloader_pin_memory
        )

    def collated(self, rows: list[dict[str, Any]]) -> Any:
        """A micro-batch; without rows, one that trains nothing and is not computed."""
        if rows:
            return self.data_collator(rows)
        nothing = torch.full((1, 1), IGNORED)
        dataset: Any = self.train_dataset
        empty = {"input_ids": nothing, "labels": nothing, "padding": 1, "rows": [], "answer_tokens": nothing[0, :0]}
        return empty | ({"instead": self.data_collator([dataset[0]])} if self.ranks.shards else {})

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        labels = inputs["labels"]
        self.own_tokens += labels.numel() - inputs.pop("padding")
        self.own_trained += int((labels != IGNORED).sum())
        rows = inputs.pop("rows")
        if "instead" in inputs:
            self.join_collectives(model, inputs["instead"])
        if not rows or self.out_of_memory:
            return torch.zeros((), device=self.args.device)
        try:
            loss = super().training_step(model, inputs, *arguments, **keywords)
        except (RuntimeError, MemoryError) as error:
            if self.ranks.count == 1 or self.ranks.shards or not is_out_of_memory(error):
                raise
            self.out_of_memory = (
                str(error) or type(error).__name__
            )  # the others must hear of it before this step can be given up
            return torch.zeros((), device=self.args.device)
        return (
            self.guard.record_loss(loss, rows=rows, inputs=inputs) * self.ranks.count
        )  # transformers logs the mean over processes

    def join_collectives(self, model: Any, inputs: dict[str, Any]) -> None:
        """A micro-batch that changes nothing: the others need this process's part of each layer, there and back."""
        computed = {
            name: value for name, value in self._prepare_inputs(inputs).items() if name not in ("padding", "rows")
        }
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, computed, num_items_in_batch=1)
        (0.0 * loss).backward()

    def _clip_grad_norm(self, model: Any) -> Any:
        figures = [float(self.own_tokens), float(self.own_trained), float(self.out_of_memory is not None)]
        self.own_tokens = self.own_trained = 0
        if self.ranks.count > 1:
            learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
            figures = all_reduce_gradients(learning, figures, device=str(self.args.device))
        tokens, trained, short = (int(figure) for figure in figures)
        if short:
            raise MemoryError(
                self.out_of_memory
                or f"said {'one process' if short == 1 else f'{short} processes'} of {self.ranks.count}"
            )
        self.progress.tokens += tokens
        self.progress.trained += trained
        return self.guard.clip_gradients(self, model, max_norm=self.args.max_grad_norm)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.job.optim, self.args)
        return self.optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """accelerate puts autocast around the model's own forward pass alone, which a loss on trained tokens goes past."""
        return self.accelerator.autocast()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # fmt: skip
        """Mean over the trained tokens of the whole accumulated step, which ``num_items_in_batch`` progress."""
        if (
            not self.fusion.loss_on_trained_tokens
        ):  # transformers multiplies by the processes, for gradients that are averaged
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) / self.ranks.count
        return self.fusion.loss(self.accelerator.unwrap_model(model), inputs) / num_items_in_batch

    def held_out_figures(self, model: Any) -> dict[str, float]:
        """Nats per trained token over the held-out rows: transformers' own mean weighs batches, not tokens."""
        return {
            "eval_loss": mean_loss(
                distributed_row_losses(model, self.held_out, batch_tokens=EVALUATION_BATCH_TOKENS, ranks=self.ranks)
            )
        }

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Takes the held-out figures and tells everyone."""
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
        """The export room writes the card, with figures in it."""


class PreferenceTrainer(Trainer):
    """The same on pairs: DPO's loss, with the adapter switched off as the reference."""

    sums: Any = 0.0

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
        """Pairs of the accumulated step, one entry each, gathered over processes as transformers gathers tokens."""
        pairs = [{"labels": None, "shift_labels": batch["answer_tokens"].chunk(2)[0]} for batch in batch_samples]
        return super()._get_num_items_in_batch(pairs, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # fmt: skip
        """Mean over the pairs of the whole accumulated step, which ``num_items_in_batch`` progress."""
        rest, tokens = dict(inputs), inputs["answer_tokens"]
        del rest["answer_tokens"]
        bare = self.accelerator.unwrap_model(model)
        with torch.no_grad(), bare.disable_adapter():
            reference = preference.answer_logprobs(preference.token_losses(model, bare, rest, self.fusion), tokens)
        policy = preference.answer_logprobs(preference.token_losses(model, bare, rest, self.fusion), tokens)
        preference_config = self.job.config.preference
        self.sums = self.sums + preference.figures(policy, reference, beta=preference_config.beta)
        return preference.pair_losses(policy - reference, tokens, preference_config).sum() / num_items_in_batch

    def join_collectives(self, model: Any, inputs: dict[str, Any]) -> None:
        before = self.sums
        super().join_collectives(model, inputs)
        self.sums = before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the loss goes what the pairs showed since it was last logged."""
        if "loss" in logs:
            sums = (
                self.sums.tolist()
                if self.ranks.count == 1
                else all_reduce_gradients([], self.sums.tolist(), device=str(self.args.device))
            )
            logs |= preference.named(torch.tensor(sums, dtype=torch.float64), prefix="train")
            self.sums = 0.0
        super().log(logs, start_time)

    def held_out_figures(self, model: Any) -> dict[str, float]:
        """Mean loss of the held-out pairs, and how often the chosen answer wins."""
        return preference.held_out_figures(
            model, self.held_out, self.job.config.preference, batch_tokens=EVALUATION_BATCH_TOKENS
        )


@dataclass(frozen=True, slots=True)
class Objective:
    """What an objective changes in training.

    Attributes:
        trainer: Takes the loss.
        collator: Makes micro-batches; called as `Collator` is.
        training: Rows of data/train -> those that can be learnt from and their tokens on average; None takes all as they are.
        held_out: Likewise for the first rows of data/heldout.
    """

    trainer: type[Trainer]
    collator: Callable[..., Any]
    training: Callable[[Any], tuple[Any, float]] | None = None
    held_out: Callable[[Any], Any] | None = None


OBJECTIVES = {
    "sft": Objective(Trainer, Collator),
    "dpo": Objective(PreferenceTrainer, preference.PairCollator, preference.training_pairs, preference.held_out_pairs),
}


def make_trainer(
    job: TrainingJob,
    *,
    folder: Path,
    progress: TrainingProgress,
    guard: NonFiniteGuard | GradientRecorder,
    callbacks: Sequence[TrainerCallback],
    ranks: Ranks,
) -> Trainer:
    """Makes the trainer, ready for ``train()``; see `Trainer` for the arguments."""
    config, data, trainable = job.config, job.data, job.trainable
    objective = OBJECTIVES[config.objective]
    rows, row_tokens = load_from_disk(str(data.folder / "train")), data.tokens / data.packed_rows
    if objective.training:
        rows, row_tokens = objective.training(rows)
    per_step = rows_per_step(config, row_tokens=row_tokens)
    steps = step_count(config, rows=len(rows), per_step=per_step)
    unit = "pairs" if objective.training else "packs" if trainable.packing else "rows"
    refuse_idle(per_step, unit=unit, processes=ranks.count)
    accumulate = micro_batches(per_step, micro_batch=config.micro_batch, processes=ranks.count)
    shared = f" on each of {ranks.count} processes" if ranks.count > 1 else ""
    log(
        "train",
        f"{steps} steps of {per_step} {unit} (micro-batch {config.micro_batch}, {accumulate} accumulated{shared}), "
        f"about {round(row_tokens * per_step):,} tokens each",
    )
    held_out = []
    if data.heldout_rows and config.evaluations:
        held_out = read_rows(data.folder / "heldout", limit=config.evaluation_rows)
    trainer = objective.trainer(
        job,
        progress=progress,
        guard=guard,
        sampler=StepBatchSampler(
            len(rows),
            rows_per_step=per_step,
            micro_batch=config.micro_batch,
            seed=job.seed,
            process=ranks.rank,
            processes=ranks.count,
            lengths=[sum(documents) for documents in rows["seq_lengths"]] if config.group_by_length else None,
        ),
        held_out=objective.held_out(held_out) if objective.held_out else held_out,
        ranks=ranks,
        args=sft_config(
            job, folder=folder / "checkpoints", steps=steps, step_tokens=row_tokens * per_step, accumulate=accumulate
        ),
        train_dataset=rows,
        eval_dataset=rows.select([0]),  # only so that evaluation is switched on; `evaluate` reads held_out
        data_collator=CollatorWithRowIds(
            objective.collator(flat=trainable.packing, pad_token_id=trainable.tokenizer.pad_token_id)
        ),
    )
    _finish(trainer, callbacks)
    return trainer


def _finish(trainer: Trainer, callbacks: Sequence[TrainerCallback]) -> None:
    """Undoes what TRL does to the adapter's dtype, joins the processes, and replaces transformers' callbacks."""
    model, dtype = trainer.job.trainable.model, trainer.job.trainable.lora.dtype
    changed = cast_adapter(model, dtype)
    if changed:
        log(
            "train",
            f"adapter in {dtype}: {changed} tensors are cast back, since TRL casts a quantized model's adapter to bfloat16",
        )
    if trainer.ranks.count > 1:
        prepare_distributed(trainer, model, ranks=trainer.ranks, seed=trainer.job.seed)
    for unwanted in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(unwanted)
    for callback in callbacks:
        trainer.add_callback(callback)
