"""Runs the run's own trainer on a few rows and restores the model afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from finetune.inference.logits import unwrap

if TYPE_CHECKING:
    from finetune.products import PreparedData
    from finetune.trainable import TrainableModel, TrainingJob

MakeTrainer = Callable[..., Any]
"""``finetune.train.trainer.make_trainer``, passed in because stages do not import each other."""

QUIET: dict[str, Any] = {
    "epochs": 1.0,
    "tokens_per_step": None,
    "group_by_length": False,
    "neftune_alpha": None,
    "patience": None,
    "select": "last",
    "checkpoints": 0,
    "log_steps": 1,
}
"""Settings of the train group that a trial replaces: they add noise, or events that the trial has no use for."""

STEADY: dict[str, Any] = {"schedule": "constant", "warmup": None, "warmup_steps": 0, "warmup_tokens": None}
"""Settings of the optim group for the peak rate from the first step: a few steps leave no time to warm up."""


LOSS_SCALE = 1024.0
"""float16 only: a power of two that keeps gradients above 6e-8, the smallest that float16 has."""

SCALE_SEARCH_STEPS = 17
"""Steps of a trial in float16: torch's loss scaler starts at 2^16 and halves it after each step that overflows."""


class GradientRecorder:
    """Records losses and gradients in place of training's guard, between the backward pass and the optimizer.

    Attributes:
        losses: Of each optimizer step, in nats per trained token (sft), per pair (dpo) or per answer (kto).
        gradients: Of the last step, before clipping; only with ``keeps_gradients``, and then the step is not taken.
    """

    def __init__(self, *, keeps_gradients: bool) -> None:
        self.keeps_gradients, self._step_loss = keeps_gradients, 0.0
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def record_loss(self, loss: Tensor, *, rows: list[int], inputs: dict[str, Any]) -> Tensor:
        """Adds the loss of a micro-batch to that of its step, and returns it unchanged."""
        self._step_loss += float(loss)
        return loss

    def clip_gradients(self, trainer: Any, model: nn.Module, *, max_norm: float) -> Tensor:
        """Clips the gradients, or records and removes them; returns their norm before clipping."""
        trainer.accelerator.unscale_gradients()
        step_loss, self._step_loss = self._step_loss, 0.0
        named = trainer.accelerator.unwrap_model(model).named_parameters()
        trained = {name: p for name, p in named if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), math.inf if self.keeps_gradients else max_norm)
        scaler = trainer.accelerator.scaler
        if scaler is not None and scaler.get_scale() > 1 and not norm.isfinite():
            return norm  # the scaler skips the step and halves its scale
        self.losses.append(step_loss)
        if self.keeps_gradients:
            self.gradients = {name: p.grad.to("cpu") for name, p in trained.items() if p.grad is not None}
            for p in trained.values():
                p.grad = None  # an optimizer does not update a parameter without a gradient
        return norm


class StopWhenRecorded(TrainerCallback):
    """Ends a trial after the first step that did not overflow."""

    def __init__(self, recorder: GradientRecorder) -> None:
        self.recorder = recorder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or bool(self.recorder.losses)


@dataclass(frozen=True, kw_only=True)
class UpcomingTraining:
    """What the run's trainer will do.

    Attributes:
        collator: Makes its micro-batches.
        tokens: Tokens that it will read, estimated from the mean length of a row.
    """

    collator: Any
    tokens: int


@dataclass(kw_only=True)
class TrialTrainer:
    """The run's own trainer, made for other rows than the run's.

    Attributes:
        job: The training that is about to start.
        make_trainer: ``finetune.train.trainer.make_trainer``.
        folder: Parent of the temporary folder with the rows and checkpoints of a trial.
    """

    job: TrainingJob
    make_trainer: MakeTrainer
    folder: Path

    @cached_property
    def upcoming(self) -> UpcomingTraining:
        """Returns the collator that will make the run's micro-batches, and about how many tokens the run will read."""
        with TemporaryDirectory(dir=self.folder) as work, restored(self.job.trainable.model):
            trainer = self._make(Path(work), self.job, recorder=GradientRecorder(keeps_gradients=False))
            arguments = trainer.args
            rows = arguments.max_steps * arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size
            tokens = round(rows * self.job.data.tokens / self.job.data.packed_rows)
            return UpcomingTraining(collator=trainer.data_collator, tokens=tokens)

    def gradients(self, rows: Sequence[dict[str, Any]], *, micro_batch: int) -> tuple[float, dict[str, Tensor]]:
        """Computes loss and gradients of one optimizer step over all rows, without the loss of trained routers: that
        is one of a whole micro-batch.

        Args:
            rows: As they are in data/train.
            micro_batch: Rows of a micro-batch; the micro-batches are accumulated.
        """
        recorder = GradientRecorder(keeps_gradients=True)
        steps = SCALE_SEARCH_STEPS if self.job.trainable.spec.placement.dtype == "float16" else 1
        stop = StopWhenRecorded(recorder)
        trained = self.trained(rows, micro_batch=micro_batch, steps=steps, recorder=recorder, callbacks=[stop])
        trainable = self.job.trainable
        with without_dropout(trainable.model), without_router_loss(trainable), trained:
            return recorder.losses[0], recorder.gradients

    @contextlib.contextmanager
    def made(self, rows: Sequence[dict[str, Any]]) -> Iterator[Any]:
        """Makes the trainer of a training whose first step reads these rows; restores the model afterwards."""
        changes = {**QUIET, "steps": 1, "rows_per_step": len(rows), "evaluations": 0}
        with TemporaryDirectory(dir=self.folder) as name, restored(self.job.trainable.model):
            job = dataclasses.replace(
                self.job,
                config=dataclasses.replace(self.job.config, **changes),
                data=self._write_data(Path(name), rows, []),
            )
            yield self._make(Path(name), job, recorder=GradientRecorder(keeps_gradients=False))

    @contextlib.contextmanager
    def trained(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        micro_batch: int,
        steps: int,
        recorder: GradientRecorder,
        callbacks: Sequence[TrainerCallback] = (),
        heldout: Sequence[dict[str, Any]] = (),
        checkpoints: int = 0,
    ) -> Iterator[Path]:
        """Trains the model for a few optimizer steps over these rows, and restores it afterwards.

        Args:
            rows: Every step reads all of them.
            micro_batch: Rows of a micro-batch.
            steps: Upper limit; a callback may stop earlier.
            recorder: Receives losses and gradients.
            callbacks: Of transformers.
            heldout: Rows of one evaluation; without rows there is none.
            checkpoints: Number of checkpoints.

        Yields:
            A folder with checkpoints/, which is deleted afterwards.
        """
        changes: dict[str, Any] = {
            **QUIET,
            "steps": steps,
            "micro_batch": micro_batch,
            "rows_per_step": len(rows),
            "evaluations": int(bool(heldout)),
            "evaluation_rows": max(1, len(heldout)),
            "checkpoints": checkpoints,
        }
        with TemporaryDirectory(dir=self.folder) as name, restored(self.job.trainable.model):
            work = Path(name)
            job = dataclasses.replace(
                self.job,
                config=dataclasses.replace(self.job.config, **changes),
                optim=dataclasses.replace(self.job.optim, **STEADY),
                data=self._write_data(work, rows, heldout),
            )
            self._make(work, job, recorder=recorder, callbacks=callbacks).train()
            yield work

    def _make(self, work: Path, job: TrainingJob, *, recorder: GradientRecorder, callbacks: Any = ()) -> Any:
        from finetune.launch.ranks import Ranks

        with contextlib.redirect_stdout(io.StringIO()):  # its log lines are about the trial
            return self.make_trainer(
                job,
                folder=work,
                progress=SimpleNamespace(tokens=0, trained=0, sampling_rows=None),
                guard=recorder,
                callbacks=callbacks,
                ranks=Ranks({}),
            )

    def _write_data(
        self, work: Path, rows: Sequence[dict[str, Any]], heldout: Sequence[dict[str, Any]]
    ) -> PreparedData:
        from datasets import Dataset

        for name, part in (("train", rows), ("heldout", heldout)):
            if part:
                with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for a few rows
                    Dataset.from_list(list(part)).save_to_disk(str(work / name))
        rendering = self.job.data.folder / "rendering.json"  # names the token that ends a turn
        if rendering.is_file():
            shutil.copyfile(rendering, work / "rendering.json")
        tokens = sum(sum(row["seq_lengths"]) for row in rows)
        return dataclasses.replace(
            self.job.data, folder=work, tokens=tokens, packed_rows=len(rows), heldout_rows=len(heldout)
        )


@contextlib.contextmanager
def restored(model: Any) -> Iterator[None]:
    """Restores trainable weights to the bit, random state, and the attributes that trainers set on a model.

    The weights are kept in host memory meanwhile.
    """
    before = [(p, p.detach().to("cpu", copy=True)) for p in model.parameters() if p.requires_grad]
    attributes = [(module, dict(vars(module))) for module in (model, unwrap(model))]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, old in before:
                parameter.data = parameter.data.to(old.dtype).copy_(old)
            for module, saved in attributes:  # e.g. a forward pass wrapped in autocast, and marks of being prepared
                vars(module).clear()
                vars(module).update(saved)


@contextlib.contextmanager
def without_router_loss(trainable: TrainableModel) -> Iterator[None]:
    """Leaves the auxiliary loss of trained routers out while the context is open."""
    before, trainable.router_loss = trainable.router_loss, 0.0
    try:
        yield
    finally:
        trainable.router_loss = before


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Turns dropout off while the context is open: its mask would depend on the layout of the rows."""
    before = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    try:
        for module, _ in before:
            module.p = 0.0
        yield
    finally:
        for module, rate in before:
            module.p = rate
