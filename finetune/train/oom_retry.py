"""Out of memory is no end: half of the micro-batch, twice the accumulation, and on from the last whole step."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from finetune.console import log
from finetune.errors import TrainError
from finetune.train.checkpoints import Checkpoint, Identity, choose, choose_together, is_complete, path_of, seal
from finetune.train.config import TrainConfig
from finetune.train.progress import Counts
from finetune.train.sampler import micro_batches

if TYPE_CHECKING:
    from torch import Tensor

PHRASES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How torch says it where it has no class for it: a CPU's allocator, cuBLAS. Source: torch's c10/core/impl/alloc_cpu.cpp."""

SMALLER = (
    "fewer tokens in a row (data.max_tokens, data.pack_tokens), train.checkpointing=full, a lower lora.rank, or a smaller base; "
    "`finetune plan fit=true` proposes settings. train.checkpointing may change on run.if_exists=resume; the others need another run.name"
)


class LastCompleteStep(TrainerCallback):
    """Knows the figures, and before the first step the weights, of the last step that was taken as a whole.

    Memory runs out in the forward or backward pass, where adapter and optimizer are still those of the step before; or in
    the first optimizer step, which makes the optimizer's states and leaves some weights moved.

    Attributes:
        counts: Figures after the last whole step.
        inside: Whether an optimizer step has begun and not ended.
    """

    def __init__(self, counts: Counts) -> None:
        self.live, self.counts, self.inside = counts, counts.copy(), False
        self.start: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.start = [
                (parameter, parameter.detach().to("cpu", copy=True))
                for parameter in model.parameters()
                if parameter.requires_grad
            ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.inside = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.inside, self.counts = False, self.live.copy()
        self.start.clear()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counts = self.live.copy()

    def restore_start(self) -> None:
        """Puts the adapter back to what it was before the first step."""
        for parameter, before in self.start:
            parameter.data.copy_(before)


@dataclasses.dataclass(kw_only=True, slots=True)
class Attempt:
    """A trainer and what must be known of it from outside."""

    trainer: Any
    whole: LastCompleteStep
    save: Callable[[], None]
    """Writes and seals a checkpoint of the trainer's present step."""


def train_with_oom_retry(
    config: TrainConfig,
    *,
    attempt: Callable[[TrainConfig], Attempt],
    folder: Path,
    identity: Identity,
    counts: Counts,
    start: Checkpoint | None,
) -> Any:
    """Trains, going on with smaller micro-batches wherever memory runs out.

    Args:
        config: The train group.
        attempt: Makes a trainer for a train group.
        folder: The checkpoints.
        identity: From `checkpoints.identify`.
        counts: The live figures; go back to the last whole step with the rest.
        start: Where to go on from; None for the beginning.

    Returns:
        The trainer that came to the end.

    Raises:
        TrainError: Memory runs out with one row at a time, or where there is nothing to go on from.
    """
    while True:
        one = attempt(dataclasses.replace(config, **_narrowed(counts)))
        trouble = run_out(one.trainer, start, stopped_early=counts.stopped_early)
        if trouble is None:
            return one.trainer
        step, arguments = one.trainer.state.global_step or (start.step if start else 0), one.trainer.args
        micro = arguments.per_device_train_batch_size
        smaller = next((size for size in range(micro // 2, 0, -1) if micro % size == 0), micro)
        ranks, rows = one.trainer.ranks, one.trainer.order.rows_per_step
        narrowed = {"micro_batch": smaller, "rows_per_step": rows, "steps": arguments.max_steps}
        accumulated = micro_batches(rows, micro_batch=smaller, processes=ranks.count)
        _detach_trainer(one.trainer)
        _secure(
            one,
            step=step,
            folder=folder,
            identity=identity,
            counts=counts,
            narrowed=narrowed if micro > 1 else counts.narrowed,
        )
        if micro == 1:
            saved = f"step {step} is saved" if is_complete(path_of(folder, step)) else "the last checkpoint is kept"
            raise TrainError(f"train: memory runs out with one row at a time ({trouble}); {saved}. Use {SMALLER}")
        log(
            "train",
            f"out of memory after step {step} ({trouble}): from here on {smaller} at once instead of {micro}, "
            f"{accumulated} accumulated instead of {arguments.gradient_accumulation_steps}, "
            "so that a step reads the same rows",
        )
        del one
        _empty()
        start = choose_together(folder, identity, ranks=ranks)
        counts.take(start.counts if start else Counts(seconds=counts.seconds, narrowed=narrowed))


def run_out(trainer: Any, start: Checkpoint | None, *, stopped_early: bool = False) -> str | None:
    """Trains; returns what the allocator said where memory ran out. With this frame goes what the traceback holds in memory."""
    if start and (start.step >= trainer.args.max_steps or stopped_early):
        load_finished(trainer, start)
        return None
    try:
        trainer.train(resume_from_checkpoint=str(start.folder) if start else None)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if trainer.ranks.shards:  # the others wait inside a layer for this process's part of it
            micro = trainer.args.per_device_train_batch_size
            remedy = f"train.micro_batch={micro // 2} and run.if_exists=resume, or {SMALLER}" if micro > 1 else SMALLER
            raise TrainError(
                f"train: memory runs out ({_first_line(error)}), which launch=fsdp cannot mend on the way. Use {remedy}"
            ) from error
        return _first_line(error)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def load_finished(trainer: Any, start: Checkpoint) -> None:
    """The state after a last step that a process before this one took: transformers 5.23 would take one step more."""
    folder = str(start.folder)
    trainer._load_from_checkpoint(folder)
    trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
    trainer._load_optimizer_and_scheduler(folder)
    trainer.state = TrainerState.load_from_json(str(start.folder / "trainer_state.json"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there is not enough memory, on a GPU or a CPU."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase.lower() in str(error).lower() for phrase in PHRASES)


def _narrowed(counts: Counts) -> dict[str, Any]:
    return {**counts.narrowed, "tokens_per_step": None} if counts.narrowed else {}


def _secure(
    one: Attempt, *, step: int, folder: Path, identity: Identity, counts: Counts, narrowed: dict[str, int]
) -> None:
    """Sees to a checkpoint to go on from that knows what changes: of the last whole step, else the newest that there is."""
    counts.take(one.whole.counts)
    counts.narrowed = narrowed
    if step == 0:
        one.whole.restore_start()
    elif one.trainer.ranks.broadcast(not is_complete(path_of(folder, step)) and not one.whole.inside):
        one.save()
    elif one.trainer.ranks.is_main:
        newest = choose(folder, identity)
        if newest is None:
            raise TrainError(
                f"train: memory ran out inside optimizer step {step + 1}, and there is no checkpoint before it. Use {SMALLER}"
            )
        newest.counts.narrowed = narrowed
        seal(newest.folder, identity, counts=newest.counts)


def _detach_trainer(trainer: Any) -> None:
    """Takes a trainer that did not come to its end off the model."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.__dict__.pop("_is_accelerate_prepared", None)  # with the mark, the next trainer would not put autocast back
    model.zero_grad(set_to_none=True)
    if trainer.neftune_noise_alpha is not None:
        trainer.neftune_hook_handle.remove()
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "close"):
            callback.close()


def _empty() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
