"""Recovers from out-of-memory with a smaller micro-batch.

Halves the micro-batch, doubles accumulation, and resumes from the last complete step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.console import log
from finetune.errors import TrainError
from finetune.files import first_error_line
from finetune.inference.adapted import free_memory
from finetune.memory import is_out_of_memory
from finetune.train.callbacks import SaveOnSignal
from finetune.train.checkpoints import Checkpoint, choose, choose_on_all_ranks, commit, is_complete, path_of
from finetune.train.progress import TrainingProgress
from finetune.train.session import Attempt, TrainingSession, make_attempt

if TYPE_CHECKING:
    from finetune.train.sft_trainer import Trainer

REMEDIES = (
    "fewer tokens in a row (data.max_tokens, data.pack_tokens), train.checkpointing=full, a lower lora.rank, or a "
    "smaller base; `finetune plan --fit` proposes settings. train.checkpointing may change on run.if_exists=resume; "
    "the others need another run.name"
)


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
            problem = run_attempt(attempt, start, stopped_early=progress.stopped_early)
            if problem is None:
                return attempt.trainer
            narrowed = _recover(session, attempt, problem=problem, step=start.step if start else 0)
            del attempt
            free_memory()
            start = choose_on_all_ranks(session.checkpoints, session.fingerprint, ranks=ranks)
            progress.take(start.progress if start else TrainingProgress(seconds=progress.seconds, narrowed=narrowed))


def run_attempt(attempt: Attempt, start: Checkpoint | None, *, stopped_early: bool = False) -> str | None:
    """Trains; returns the allocator's message where memory ran out.

    Returning frees the tensors that the traceback keeps alive.
    """
    trainer = attempt.trainer
    if start and (start.step >= trainer.args.max_steps or stopped_early):
        attempt.load_finished(start)
        return None
    try:
        trainer.train(resume_from_checkpoint=str(start.folder) if start else None)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = first_error_line(error)
        if trainer.ranks.shards:  # the other processes wait inside a layer for this one's part of it
            micro = trainer.args.per_device_train_batch_size
            remedy = REMEDIES
            if micro > 1:
                remedy = f"train.micro_batch={micro // 2} and run.if_exists=resume, or {REMEDIES}"
            raise TrainError(
                f"train: memory runs out ({problem}), and launch=fsdp cannot retry by itself. Use {remedy}"
            ) from error
        return problem
    return None


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
    attempt.detach()
    _ensure_checkpoint(session, attempt, step=step, narrowed=narrowed if micro > 1 else progress.narrowed)
    if micro == 1:
        saved = "the last checkpoint is kept"
        if is_complete(path_of(session.checkpoints, step)):
            saved = f"step {step} is saved"
        raise TrainError(f"train: memory runs out with one row at a time ({problem}); {saved}. Use {REMEDIES}")
    accumulate = trainer.sampler.micro_batches(rows, micro_batch=smaller)
    log(
        "train",
        f"out of memory after step {step} ({problem}): continues with micro-batches of {smaller} instead of {micro}, "
        f"{accumulate} accumulated instead of {accumulated}, so that a step reads the same rows",
    )
    return narrowed


def _ensure_checkpoint(session: TrainingSession, attempt: Attempt, *, step: int, narrowed: dict[str, int]) -> None:
    """Makes sure a checkpoint exists that records the new micro-batch size.

    It is that of the last complete step, or else the newest one.
    """
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
                f"Use {REMEDIES}"
            )
        newest.progress.narrowed = narrowed
        commit(newest.folder, session.fingerprint, progress=newest.progress)
