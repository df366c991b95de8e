"""TRL's SFTTrainer, told everything and left no room to decide. The only importer of trl."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import load_from_disk
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from finetune.console import say
from finetune.launch.config import process_count
from finetune.lora import cast_adapter
from finetune.measure import Collator, mean_loss, read_rows, row_losses
from finetune.optim import make_optimizer, schedule_arguments
from finetune.train import preference
from finetune.train.guard import Numbered
from finetune.train.order import ByLength

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from finetune.data import PreparedData
    from finetune.hardware import Placement
    from finetune.lora import LoraConfig
    from finetune.optim import OptimConfig
    from finetune.speed import Quick
    from finetune.train.config import TrainConfig
    from finetune.train.counts import Counts
    from finetune.train.guard import Guard

EVALUATION_BATCH_TOKENS = 2048


class Trainer(SFTTrainer):
    """Counts tokens, and takes the held-out loss by token as every other stage does."""

    counts: Counts
    guard: Guard
    order: ByLength | None
    quick: Quick
    optim: OptimConfig
    config: TrainConfig
    held_out: list[dict[str, Any]]

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        labels = inputs["labels"]
        self.counts.tokens += labels.numel() - inputs.pop("padding")
        self.counts.trained += int((labels != -100).sum())
        rows = inputs.pop("rows", [])
        loss = super().training_step(model, inputs, *arguments, **keywords)
        return self.guard.hear(loss, rows=rows, inputs=inputs)

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.guard.clip(self, model, max_norm=self.args.max_grad_norm)

    def _get_train_sampler(self, *arguments: Any, **keywords: Any) -> Any:
        return super()._get_train_sampler(*arguments, **keywords) if self.order is None else self.order

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.optim, self.args)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # fmt: skip
        """Mean over the trained tokens of the whole accumulated step, which ``num_items_in_batch`` counts."""
        if not self.quick.trained_only:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.quick.loss(self.accelerator.unwrap_model(model), inputs) / num_items_in_batch

    def held_out_figures(self, model: Any) -> dict[str, float]:
        """Nats per trained token over the held-out rows: transformers' own mean weighs batches, not tokens."""
        return {"eval_loss": mean_loss(row_losses(model, self.held_out, batch_tokens=EVALUATION_BATCH_TOKENS))}

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
        """Mean over the pairs of the whole accumulated step, which ``num_items_in_batch`` counts."""
        rest, tokens = dict(inputs), inputs["answer_tokens"]
        del rest["answer_tokens"]
        bare = self.accelerator.unwrap_model(model)
        with torch.no_grad(), bare.disable_adapter():
            reference = preference.answer_logprobs(preference.token_losses(model, bare, rest, self.quick), tokens)
        policy = preference.answer_logprobs(preference.token_losses(model, bare, rest, self.quick), tokens)
        numbers = self.config.preference
        self.sums = self.sums + preference.figures(policy, reference, beta=numbers.beta)
        return preference.pair_losses(policy - reference, tokens, numbers).sum() / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the loss goes what the pairs showed since it was last logged."""
        if "loss" in logs:
            logs |= preference.named(self.sums, prefix="train")
            self.sums = 0.0
        super().log(logs, start_time)

    def held_out_figures(self, model: Any) -> dict[str, float]:
        """Mean loss of the held-out pairs, and how often the chosen answer wins."""
        return preference.held_out_figures(model, self.held_out, self.config.preference, batch_tokens=EVALUATION_BATCH_TOKENS)


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
    config: TrainConfig,
    *,
    folder: Path,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    lora: LoraConfig,
    optim: OptimConfig,
    placement: Placement,
    upcast: str,
    packing: bool,
    quick: Quick,
    seed: int,
    counts: Counts,
    guard: Guard,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """The trainer, ready for ``train()``."""
    objective = OBJECTIVES[config.objective]
    rows, row_tokens = load_from_disk(str(data.folder / "train")), data.tokens / data.packed_rows
    if objective.training:
        rows, row_tokens = objective.training(rows)
    accumulate = accumulation(config, row_tokens=row_tokens)
    steps = step_count(config, rows=len(rows), accumulate=accumulate)
    per_step = accumulate * config.micro_batch * process_count()
    unit = "pairs" if objective.training else "packs" if packing else "rows"
    say(
        "train",
        f"{steps} steps of {per_step} {unit} ({config.micro_batch} at once, {accumulate} accumulated), "
        f"about {round(row_tokens * per_step):,} tokens each",
    )
    autocast = placement.dtype if quick.autocast and (lora.dtype != placement.dtype or upcast != "none") else None
    schedule = schedule_arguments(optim, steps=steps, tokens_per_step=row_tokens * per_step)
    settings = arguments(
        config, optim=optim, placement=placement, schedule={"max_steps": steps, **schedule}, accumulate=accumulate, autocast=autocast,
        seed=seed,
    )  # fmt: skip
    trainer = objective.trainer(
        model=model,
        args=SFTConfig(output_dir=str(folder / "checkpoints"), **settings),
        train_dataset=rows,
        eval_dataset=rows.select([0]),  # only so that evaluation is switched on; `evaluate` reads held_out
        processing_class=tokenizer,
        data_collator=Numbered(objective.collator(flat=packing, pad_token_id=tokenizer.pad_token_id)),
    )
    trainer.counts, trainer.guard, trainer.quick, trainer.optim, trainer.config = counts, guard, quick, optim, config
    lengths = [sum(documents) for documents in rows["seq_lengths"]] if config.group_by_length else []
    trainer.order = ByLength(lengths, rows_per_step=per_step, seed=seed) if config.group_by_length else None
    held_out = read_rows(data.folder / "heldout", limit=config.evaluation_rows) if data.heldout_rows and config.evaluations else []
    trainer.held_out = objective.held_out(held_out) if objective.held_out else held_out
    changed = cast_adapter(model, lora.dtype)
    if changed:
        say("train", f"adapter in {lora.dtype}: {changed} tensors are cast back, since TRL puts a quantized model's adapter into bfloat16")
    for unwanted in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(unwanted)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def arguments(
    config: TrainConfig,
    *,
    optim: OptimConfig,
    placement: Placement,
    schedule: dict[str, Any],
    accumulate: int,
    autocast: str | None,
    seed: int,
) -> dict[str, Any]:
    """What TRL and transformers are told; nothing that matters is left to their defaults.

    Args:
        config: The train group.
        optim: The optim group.
        placement: Names the optimizer that is used.
        schedule: ``max_steps``, and the learning rate's course over them.
        accumulate: Micro-batches per step.
        autocast: Numbers to compute in where weights differ from them; None where all are the same already.
        seed: Order of the rows and dropout.
    """
    full = config.checkpointing == "full"
    steps = schedule["max_steps"]
    return {
        **schedule,
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": optim.learning_rate,
        "optim": placement.optimizer,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "max_grad_norm": optim.max_grad_norm,
        "bf16": autocast == "bfloat16",
        "fp16": autocast == "float16",
        "use_cpu": placement.device == "cpu",
        "gradient_checkpointing": full,
        "activation_offloading": config.offload,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if full else None,
        "eval_strategy": "steps" if config.evaluations else "no",
        "eval_steps": every(steps, config.evaluations),
        "save_strategy": "steps" if config.checkpoints else "no",
        "save_steps": every(steps, config.checkpoints),
        "neftune_noise_alpha": config.neftune_alpha,
        "remove_unused_columns": False,  # the guard names the rows by their numbers
        "logging_steps": config.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "seed": seed,
        "data_seed": seed,
        "full_determinism": config.deterministic,
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "dataloader_pin_memory": placement.device == "cuda",
    }


def accumulation(config: TrainConfig, *, row_tokens: float) -> int:
    """Micro-batches per step: as many as come nearest to ``tokens_per_step`` or make up ``rows_per_step``."""
    if config.rows_per_step is not None:
        return max(1, round(config.rows_per_step / (config.micro_batch * process_count())))
    assert config.tokens_per_step is not None
    return max(1, round(config.tokens_per_step / (row_tokens * config.micro_batch * process_count())))


def step_count(config: TrainConfig, *, rows: int, accumulate: int) -> int:
    """Optimizer steps in all; a last, smaller step of an epoch counts as one."""
    if config.steps is not None:
        return config.steps
    batches = math.ceil(rows / (config.micro_batch * process_count()))
    return max(1, math.ceil(math.ceil(batches / accumulate) * config.epochs))


def every(steps: int, times: int) -> int:
    """The distance that puts so many events evenly over the steps, the last one at the end."""
    return max(1, math.ceil(steps / times)) if times else steps
