"""Builds the SFTConfig of a training, and computes steps and rows per step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from trl import SFTConfig

from finetune.console import log
from finetune.errors import TrainError
from finetune.optim import schedule_arguments

if TYPE_CHECKING:
    from finetune.train.config import TrainConfig
    from finetune.trainable import TrainingJob


def sft_config(job: TrainingJob, *, folder: Path, steps: int, step_tokens: float, accumulate: int) -> SFTConfig:
    """Returns TRL's configuration; everything that changes a result is set explicitly.

    Args:
        job: Model, rows and settings.
        folder: Receives the checkpoints.
        steps: Optimizer steps.
        step_tokens: Approximate tokens of an optimizer step.
        accumulate: Micro-batches per step.
    """
    config, optim, placement = job.config, job.optim, job.trainable.spec.placement
    recomputes, autocast = config.recomputes, _autocast_dtype(job)
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        **schedule_arguments(optim, steps=steps, tokens_per_step=step_tokens),
        per_device_train_batch_size=config.micro_batch_rows,
        gradient_accumulation_steps=accumulate,
        learning_rate=optim.learning_rate,
        optim=placement.optimizer,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        max_grad_norm=optim.max_grad_norm,
        bf16=autocast == "bfloat16",
        fp16=autocast == "float16",
        use_cpu=placement.device == "cpu",
        activation_checkpointing=recomputes,
        activation_offloading=config.checkpointing == "offloaded",
        activation_checkpointing_kwargs={"use_reentrant": False} if recomputes else None,
        eval_strategy="steps" if config.evaluates else "no",
        eval_steps=config.eval_steps or every(steps, config.evaluations),
        save_strategy="steps" if config.saves else "no",
        save_steps=config.save_steps or every(steps, config.checkpoints),
        neftune_noise_alpha=config.neftune_alpha,
        remove_unused_columns=False,  # the guard needs the column of ledger numbers
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        seed=job.seed,
        data_seed=job.seed,
        full_determinism=config.deterministic,
        report_to="none",
        disable_tqdm=True,
        router_aux_loss_coef=job.trainable.router_loss,  # TRL would add the model's own where routers are frozen
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=placement.device == "cuda",
    )


def _autocast_dtype(job: TrainingJob) -> str | None:
    """Returns the dtype to autocast to; None where all weights have one dtype, or fused layers cast themselves."""
    trainable, dtype = job.trainable, job.trainable.spec.placement.dtype
    mixed = trainable.lora.dtype != dtype or trainable.spec.config.upcast != "none"
    return dtype if trainable.fusion.autocast and mixed else None


def rows_per_step(config: TrainConfig, *, row_tokens: float) -> int:
    """Returns the rows of an optimizer step over all processes; the micro-batch does not change them."""
    if config.rows_per_step is not None:
        return config.rows_per_step
    assert config.tokens_per_step is not None
    return max(1, round(config.tokens_per_step / row_tokens))


def refuse_idle_processes(per_step: int, *, unit: str, processes: int) -> None:
    """Refuses a launch in which some processes would never get a row; logs where some get fewer than others.

    Raises:
        TrainError: A step has fewer rows than there are processes.
    """
    if per_step < processes:
        raise TrainError(
            f"launch.processes={processes}, and a step reads {per_step} {unit}: {processes - per_step} would have "
            "nothing to do. Raise train.tokens_per_step, or use fewer processes"
        )
    if per_step % processes:
        log(
            "train",
            f"{per_step} {unit} do not divide evenly among {processes} processes: in each step some wait for others",
        )


def step_count(config: TrainConfig, *, rows: int, per_step: int) -> int:
    """Returns the number of optimizer steps; the last step of an epoch counts as one even where it has fewer rows."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(math.ceil(rows / per_step) * config.epochs))


def every(steps: int, times: int) -> int:
    """Returns the interval that spreads ``times`` events evenly over the steps, the last one at the end."""
    return max(1, math.ceil(steps / times)) if times else steps
