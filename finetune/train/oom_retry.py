"""Recovers from out-of-memory: halves the micro-batch, doubles accumulation, and resumes from the last complete step."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from finetune.console import log
from finetune.errors import TrainError
from finetune.train.callbacks import CheckpointSealer, EarlyStopping, MetricsLogger, ProgressLine, SaveOnSignal
from finetune.train.checkpoints import (
    Checkpoint,
    TrainingFingerprint,
    choose,
    choose_on_all_ranks,
    commit,
    forget_lost_best,
    is_complete,
    path_of,
)
from finetune.train.guard import NonFiniteGuard
from finetune.train.progress import TrainingProgress
from finetune.train.sampler import micro_batches

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.launch.ranks import Ranks
    from finetune.tracking import Trackers
    from finetune.train.trainer import Trainer
    from finetune.trainable import TrainingJob

PHRASES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Messages of torch errors that have no class: a CPU's allocator, cuBLAS. Source: torch's c10/core/impl/alloc_cpu.cpp."""

SMALLER = (
    "fewer tokens in a row (data.max_tokens, data.pack_tokens), train.checkpointing=full, a lower lora.rank, or a "
    "smaller base; `finetune plan --fit` proposes settings. train.checkpointing may change on run.if_exists=resume; "
    "the others need another run.name"
)


class LastCompleteStep(TrainerCallback):
    """Remembers the progress, and before the first step the weights, of the last optimizer step that was completed.

    Memory runs out in the forward or backward pass, where adapter and optimizer are still those of the step before; or
    in the first optimizer step, which makes the optimizer's states and leaves some weights moved.

    Attributes:
        progress: After the last complete step.
        inside_step: Whether an optimizer step has begun and not ended.
    """

    def __init__(self, progress: TrainingProgress) -> None:
        self.live, self.progress, self.inside_step = progress, progress.copy(), False
        self.start: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.start = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in trained]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.inside_step = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.inside_step, self.progress = False, self.live.copy()
        self.start.clear()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress = self.live.copy()

    def restore_start(self) -> None:
        """Puts the adapter back to what it was before the first step."""
        for parameter, before in self.start:
            parameter.data.copy_(before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSession:
    """One training with all its attempts.

    Attributes:
        job: Model, rows and settings.
        folder: The stage's folder.
        fingerprint: From `checkpoints.fingerprint_training`.
        progress: The live figures; go back to the last complete step with the rest.
        trackers: Receive every logged metric.
        ranks: This process and the others.
    """

    job: TrainingJob
    folder: Path
    fingerprint: TrainingFingerprint
    progress: TrainingProgress
    trackers: Trackers
    ranks: Ranks

    @property
    def checkpoints(self) -> Path:
        """Returns the folder of the checkpoints."""
        return self.folder / "checkpoints"


@dataclasses.dataclass(kw_only=True, slots=True)
class Attempt:
    """A trainer, and the two callbacks that recovering needs."""

    trainer: Trainer
    last_step: LastCompleteStep
    sealer: CheckpointSealer

    def save(self) -> None:
        """Writes and commits a checkpoint of the trainer's present step."""
        trainer = self.trainer
        trainer._save_checkpoint(trainer.model, trial=None)
        self.sealer.on_save(trainer.args, trainer.state, trainer.control)


def train_with_oom_retry(session: TrainingSession, start: Checkpoint | None) -> Trainer:
    """Trains, retrying with smaller micro-batches after out-of-memory, and returns the trainer.

    Args:
        session: What is trained.
        start: The checkpoint to continue from; None for the beginning.

    Raises:
        TrainError: Memory runs out with one row at a time, or where there is nothing to continue from.
    """
    progress, ranks = session.progress, session.ranks
    with SaveOnSignal(ranks) as stop:
        while True:
            attempt = make_attempt(session, stop)
            problem = run_attempt(attempt.trainer, start, stopped_early=progress.stopped_early)
            if problem is None:
                return attempt.trainer
            narrowed = _recover(session, attempt, problem=problem, step=start.step if start else 0)
            del attempt
            _free_memory()
            start = choose_on_all_ranks(session.checkpoints, session.fingerprint, ranks=ranks)
            progress.take(start.progress if start else TrainingProgress(seconds=progress.seconds, narrowed=narrowed))


def make_attempt(session: TrainingSession, stop: SaveOnSignal) -> Attempt:
    """Makes a trainer with the micro-batch that out-of-memory has left."""
    from finetune.train.trainer import make_trainer  # takes seconds, in which a signal must be received already

    job, progress, ranks = session.job, session.progress, session.ranks
    config = job.config
    if progress.narrowed:
        config = dataclasses.replace(config, **{**progress.narrowed, "tokens_per_step": None})  # type: ignore[arg-type]
    keep_best = config.select == "best"
    if keep_best:
        forget_lost_best(progress, session.checkpoints)
    last_step = LastCompleteStep(progress)
    sealer = CheckpointSealer(
        progress, fingerprint=session.fingerprint, keep=config.keep_checkpoints, keep_best=keep_best, ranks=ranks
    )
    callbacks: list[TrainerCallback] = [
        EarlyStopping(progress, patience=config.patience, keep_best=keep_best),
        last_step,
        sealer,
    ]
    if ranks.is_main:
        metrics = MetricsLogger(session.folder / "metrics.jsonl", progress=progress, trackers=session.trackers)
        callbacks = [metrics, *callbacks, ProgressLine(progress)]
    trainer = make_trainer(
        dataclasses.replace(job, config=config),
        folder=session.folder,
        progress=progress,
        guard=NonFiniteGuard(progress, limit=config.non_finite_steps),
        callbacks=[*callbacks, stop],
        ranks=ranks,
    )
    return Attempt(trainer=trainer, last_step=last_step, sealer=sealer)


def run_attempt(trainer: Trainer, start: Checkpoint | None, *, stopped_early: bool = False) -> str | None:
    """Trains; returns the allocator's message where memory ran out.

    Returning frees the tensors that the traceback keeps alive.
    """
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
                f"train: memory runs out ({_first_line(error)}), and launch=fsdp cannot retry by itself. Use {remedy}"
            ) from error
        return _first_line(error)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def load_finished(trainer: Trainer, start: Checkpoint) -> None:
    """Loads the state after a last step that an earlier process took: transformers 5.23 would take one step more."""
    folder = str(start.folder)
    trainer._load_from_checkpoint(folder)
    trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
    trainer._load_optimizer_and_scheduler(folder)
    trainer.state = TrainerState.load_from_json(str(start.folder / "trainer_state.json"))


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that there is not enough memory, on a GPU or a CPU."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase.lower() in str(error).lower() for phrase in PHRASES)


def _recover(session: TrainingSession, attempt: Attempt, *, problem: str, step: int) -> dict[str, int]:
    """Saves what the aborted attempt completed; returns the fields of the train group for the next one.

    Args:
        session: What is trained.
        attempt: The one that ran out of memory.
        problem: The allocator's message.
        step: That the attempt started from.
    """
    trainer, progress = attempt.trainer, session.progress
    step = trainer.state.global_step or step
    micro, accumulated = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    smaller = next((size for size in range(micro // 2, 0, -1) if micro % size == 0), micro)
    rows = trainer.sampler.rows_per_step
    narrowed = {"micro_batch": smaller, "rows_per_step": rows, "steps": trainer.args.max_steps}
    _detach_trainer(trainer)
    _ensure_checkpoint(session, attempt, step=step, narrowed=narrowed if micro > 1 else progress.narrowed)
    if micro == 1:
        saved = "the last checkpoint is kept"
        if is_complete(path_of(session.checkpoints, step)):
            saved = f"step {step} is saved"
        raise TrainError(f"train: memory runs out with one row at a time ({problem}); {saved}. Use {SMALLER}")
    accumulate = micro_batches(rows, micro_batch=smaller, processes=session.ranks.count)
    log(
        "train",
        f"out of memory after step {step} ({problem}): continues with micro-batches of {smaller} instead of {micro}, "
        f"{accumulate} accumulated instead of {accumulated}, so that a step reads the same rows",
    )
    return narrowed


def _ensure_checkpoint(session: TrainingSession, attempt: Attempt, *, step: int, narrowed: dict[str, int]) -> None:
    """Makes sure a checkpoint exists that records the new micro-batch size: of the last complete step, or else the newest."""
    progress, ranks, checkpoints = session.progress, session.ranks, session.checkpoints
    progress.take(attempt.last_step.progress)
    progress.narrowed = narrowed
    if step == 0:
        attempt.last_step.restore_start()
    elif ranks.broadcast(not is_complete(path_of(checkpoints, step)) and not attempt.last_step.inside_step):
        attempt.save()
    elif ranks.is_main:
        newest = choose(checkpoints, session.fingerprint)
        if newest is None:
            raise TrainError(
                f"train: memory ran out inside optimizer step {step + 1}, and there is no checkpoint before it. "
                f"Use {SMALLER}"
            )
        newest.progress.narrowed = narrowed
        commit(newest.folder, session.fingerprint, progress=newest.progress)


def _detach_trainer(trainer: Trainer) -> None:
    """Removes an aborted trainer's hooks from the model."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.__dict__.pop("_is_accelerate_prepared", None)  # with the mark, the next trainer would not restore autocast
    model.zero_grad(set_to_none=True)
    if trainer.neftune_noise_alpha is not None:
        trainer.neftune_hook_handle.remove()
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "close"):
            callback.close()


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
