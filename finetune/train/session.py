"""One training and its attempts: each attempt is a trainer with its callbacks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from finetune.train.callbacks import CheckpointSealer, EarlyStopping, MetricsLogger, ProgressLine, SaveOnSignal
from finetune.train.checkpoints import Checkpoint, TrainingFingerprint, forget_lost_best
from finetune.train.guard import NonFiniteGuard

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.launch.ranks import Ranks
    from finetune.tracking import Trackers
    from finetune.train.progress import TrainingProgress
    from finetune.train.sft_trainer import Trainer
    from finetune.trainable import TrainingJob


class LastCompleteStep(TrainerCallback):
    """Remembers the progress after the last complete optimizer step, and before the first step the weights.

    Memory runs out in the forward or backward pass, where adapter and optimizer are still those of the step before; or
    in the first optimizer step, which allocates the optimizer's state and leaves some weights changed.

    Attributes:
        progress: After the last complete step.
        inside_step: Whether an optimizer step has begun and not ended.
    """

    def __init__(self, progress: TrainingProgress) -> None:
        self.live, self.progress, self.inside_step = progress, progress.copy(), False
        self.start: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.start = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in trainable]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.inside_step = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.inside_step, self.progress = False, self.live.copy()
        self.start.clear()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress = self.live.copy()

    def restore_start(self) -> None:
        """Restores the adapter as it was before the first step."""
        for parameter, before in self.start:
            parameter.data.copy_(before)


@dataclass(frozen=True, kw_only=True)
class TrainingSession:
    """One training with all its attempts.

    Attributes:
        job: Model, rows and settings.
        folder: The stage's folder.
        fingerprint: From `checkpoints.fingerprint_training`.
        progress: The live figures; an out-of-memory retry resets them to those of the last complete step.
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


@dataclass(kw_only=True, slots=True)
class Attempt:
    """A trainer, and the two callbacks that recovering from out-of-memory needs."""

    trainer: Trainer
    last_step: LastCompleteStep
    sealer: CheckpointSealer

    def save(self) -> None:
        """Writes and commits a checkpoint of the trainer's current step."""
        trainer = self.trainer
        trainer._save_checkpoint(trainer.model, trial=None)
        self.sealer.on_save(trainer.args, trainer.state, trainer.control)

    def load_finished(self, start: Checkpoint) -> None:
        """Loads the state of a finished training: resuming with transformers 5.23 would train one more step."""
        trainer, folder = self.trainer, str(start.folder)
        trainer._load_from_checkpoint(folder)
        trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
        trainer._load_optimizer_and_scheduler(folder)
        trainer.state = TrainerState.load_from_json(str(start.folder / "trainer_state.json"))

    def detach(self) -> None:
        """Removes an aborted trainer's hooks from the model."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        model.__dict__.pop("_is_accelerate_prepared", None)  # a marked model would be trained without autocast
        model.zero_grad(set_to_none=True)
        if trainer.neftune_noise_alpha is not None:
            trainer.neftune_hook_handle.remove()
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "close"):
                callback.close()


def make_attempt(session: TrainingSession, stop: SaveOnSignal) -> Attempt:
    """Makes a trainer with the current micro-batch size, which an out-of-memory retry may have lowered."""
    from finetune.train.trainer import make_trainer  # takes seconds, during which signals must be handled already

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
    stopping = EarlyStopping(progress, patience=config.patience, keep_best=keep_best)
    callbacks: list[TrainerCallback] = [stopping, last_step, sealer]
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
