"""Makes the trainer of the run's objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import load_from_disk
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.console import log
from finetune.inference.collate import Collator
from finetune.inference.rows import read_rows
from finetune.lora import cast_adapter
from finetune.objectives import OBJECTIVES, UNPAIRED
from finetune.products import UNDESIRABLE_HELDOUT
from finetune.train.arguments import refuse_idle_processes, rows_per_step, sft_config, step_count
from finetune.train.distributed import prepare_distributed
from finetune.train.grpo_trainer import GRPOTrainer
from finetune.train.guard import CollatorWithRowIds
from finetune.train.kto import APO_ZERO, AnswerCollator, answers_with_tokens, log_weights, training_answers
from finetune.train.kto_trainer import KTOTrainer
from finetune.train.preference import PairCollator, held_out_pairs, training_pairs
from finetune.train.preference_trainer import PreferenceTrainer
from finetune.train.rollout import PromptCollator
from finetune.train.sampler import StepBatchSampler, micro_batches
from finetune.train.sft_trainer import Trainer

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from finetune.launch.ranks import Ranks
    from finetune.preflight.trial import GradientRecorder
    from finetune.train.guard import NonFiniteGuard
    from finetune.train.progress import TrainingProgress
    from finetune.trainable import TrainingJob


@dataclass(frozen=True, slots=True)
class Method:
    """How rows of one unit are trained on.

    Attributes:
        trainer: Computes the loss.
        collator: Makes micro-batches; called as `Collator` is.
        training: Takes the rows of data/train; returns those that can be trained on and their mean number of tokens.
            None trains on all rows.
        held_out: Takes the first rows of data/heldout; returns those that can be evaluated. None evaluates all.
    """

    trainer: type[Trainer]
    collator: Callable[..., Any]
    training: Callable[[Any], tuple[Any, float]] | None = None
    held_out: Callable[[Any], Any] | None = None


METHODS = {
    "token": Method(Trainer, Collator),
    "answer": Method(KTOTrainer, AnswerCollator, training_answers, answers_with_tokens),
    "pair": Method(PreferenceTrainer, PairCollator, training_pairs, held_out_pairs),
    "completion": Method(GRPOTrainer, PromptCollator),
}
"""By the ``unit`` of `finetune.objectives.OBJECTIVES`."""

SAMPLES = "samples.jsonl"
"""File of the train stage with the sampled answers."""


def make_trainer(
    job: TrainingJob,
    *,
    folder: Path,
    progress: TrainingProgress,
    guard: NonFiniteGuard | GradientRecorder,
    callbacks: Sequence[TrainerCallback],
    ranks: Ranks,
) -> Trainer:
    """Makes the trainer, ready for ``train()``.

    Args:
        job: Model, rows and settings.
        folder: Receives the checkpoints.
        progress: Receives the counted tokens.
        guard: Gets every loss, and the gradients before the optimizer.
        callbacks: Replace transformers' own.
        ranks: This process and the others.
    """
    config, data, trainable = job.config, job.data, job.trainable
    objective = OBJECTIVES[config.objective]
    method = METHODS[objective.unit]
    rows, row_tokens = load_from_disk(str(data.folder / "train")), data.tokens / data.packed_rows
    prepared = rows
    if method.training:
        rows, row_tokens = method.training(rows)
    per_step = rows_per_step(config, row_tokens=row_tokens)
    steps = step_count(config, rows=len(rows), per_step=per_step)
    unit = f"{objective.unit}s" if objective.compares else "packs" if trainable.packing else "rows"
    group = config.grpo.group if objective.samples else 1
    refuse_idle_processes(per_step * group, unit=unit, processes=ranks.count)
    accumulate = micro_batches(per_step * group, micro_batch=config.micro_batch_rows, processes=ranks.count)
    shared = f" on each of {ranks.count} processes" if ranks.count > 1 else ""
    log(
        "train",
        f"{steps} steps of {per_step * group} {unit} (micro-batch {config.micro_batch}, {accumulate} accumulated"
        f"{shared}), "
        + (f"{group} for each prompt" if group > 1 else f"about {round(row_tokens * per_step):,} tokens each"),
    )
    held_out = []
    if data.heldout_rows and config.evaluates:
        held_out = read_rows(data.folder / "heldout", limit=config.evaluation_rows)
        others = data.folder / UNDESIRABLE_HELDOUT
        if objective.rows == UNPAIRED and others.is_dir() and len(load_from_disk(str(others))):
            held_out += read_rows(others, limit=config.evaluation_rows)
    checkpoints, step_tokens = folder / "checkpoints", row_tokens * per_step
    collator = method.collator(flat=trainable.packing, pad_token_id=trainable.tokenizer.pad_token_id)
    if isinstance(collator, AnswerCollator):
        log_weights(rows["desirable"], config.preference)
        if config.preference.loss != APO_ZERO:
            collator = replace(collator, rows=prepared)
    trainer = method.trainer(
        job,
        progress=progress,
        guard=guard,
        sampler=StepBatchSampler(
            len(rows),
            rows_per_step=per_step,
            micro_batch=config.micro_batch_rows,
            seed=job.seed,
            process=ranks.rank,
            processes=ranks.count,
            group=group,
            lengths=[sum(documents) for documents in rows["seq_lengths"]] if config.group_by_length else None,
        ),
        held_out=method.held_out(held_out) if method.held_out else held_out,
        ranks=ranks,
        args=sft_config(job, folder=checkpoints, steps=steps, step_tokens=step_tokens, accumulate=accumulate),
        train_dataset=rows,
        eval_dataset=rows.select([0]),  # only switches evaluation on; `Trainer.evaluate` reads held_out
        data_collator=CollatorWithRowIds(collator),
    )
    if isinstance(trainer, GRPOTrainer) and ranks.is_main:
        trainer.samples = folder / SAMPLES
    _finish(trainer, callbacks)
    return trainer


def _finish(trainer: Trainer, callbacks: Sequence[TrainerCallback]) -> None:
    """Casts the adapter back to its dtype, prepares several processes, and replaces transformers' callbacks."""
    model, dtype = trainer.job.trainable.model, trainer.job.trainable.lora.dtype
    cast = cast_adapter(model, dtype)
    if cast:
        log("train", f"casts {cast} adapter tensors back to {dtype}; TRL had cast them to bfloat16")
    if trainer.ranks.count > 1:
        prepare_distributed(trainer, model, ranks=trainer.ranks, seed=trainer.job.seed)
    for unwanted in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(unwanted)
    for callback in callbacks:
        trainer.add_callback(callback)
