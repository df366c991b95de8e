"""What TRL and transformers are told, and how many steps of how many rows a training takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import TrainError

if TYPE_CHECKING:
    from finetune.hardware import Placement
    from finetune.optim import OptimConfig
    from finetune.train.config import TrainConfig


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
        "activation_checkpointing": full,
        "activation_offloading": config.offload,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if full else None,
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


def rows_per_step(config: TrainConfig, *, row_tokens: float) -> int:
    """Rows of an optimizer step over all processes, however many these are: the whole micro-batches that come nearest to
    ``tokens_per_step`` or make up ``rows_per_step``."""
    if config.rows_per_step is not None:
        return config.micro_batch * max(1, round(config.rows_per_step / config.micro_batch))
    assert config.tokens_per_step is not None
    return config.micro_batch * max(1, round(config.tokens_per_step / (row_tokens * config.micro_batch)))


def refuse_idle(per_step: int, *, unit: str, processes: int) -> None:
    """A process that never gets a row is a mistake; one that gets fewer is said."""
    if per_step < processes:
        raise TrainError(
            f"launch.processes={processes}, and a step reads {per_step} {unit}: {processes - per_step} would have nothing to do. "
            "Raise train.tokens_per_step, or take fewer processes"
        )
    if per_step % processes:
        log(
            "train",
            f"{per_step} {unit} do not come out even on {processes} processes: some wait for the others in each step",
        )


def step_count(config: TrainConfig, *, rows: int, per_step: int) -> int:
    """Optimizer steps in all; a last, smaller step of an epoch counts as one."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(math.ceil(rows / per_step) * config.epochs))


def every(steps: int, times: int) -> int:
    """The distance that puts so many events evenly over the steps, the last one at the end."""
    return max(1, math.ceil(steps / times)) if times else steps
