"""The run's own trainer on a handful of rows: what it reports is what training would do, and nothing of it stays."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.inference.logits import unwrap

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from finetune.products import PreparedData
    from finetune.trainable import TrainingJob

MakeTrainer = Callable[..., Any]
"""``finetune.train.trainer.make_trainer``, handed in because no stage imports another."""

QUIET: dict[str, Any] = {
    "epochs": 1.0, "tokens_per_step": None, "group_by_length": False, "neftune_alpha": None, "patience": None, "select": "last",
    "evaluations": 0, "checkpoints": 0, "log_steps": 1,
}  # fmt: skip
"""Settings of the train group that a trial does not take over: they make noise, or events that it does not ask for."""

STEADY: dict[str, Any] = {"schedule": "constant", "warmup": None, "warmup_steps": 0, "warmup_tokens": None}
"""The optim group's peak rate from the first step on: a handful of steps has no time to warm up."""


class GradientRecorder:
    """Stands where training has its guard: between the backward pass and the optimizer.

    Attributes:
        losses: Of each optimizer step, in nats per trained token (sft) or per pair (dpo).
        gradients: Of the last step, before they are clipped; only where asked for, and then the step is not taken.
    """

    def __init__(self, *, keeps_gradients: bool) -> None:
        self.keeps_gradients, self._heard = keeps_gradients, 0.0
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def record_loss(self, loss: Tensor, *, rows: list[int], inputs: dict[str, Any]) -> Tensor:
        self._heard += float(loss)
        return loss

    def clip_gradients(self, trainer: Any, model: nn.Module, *, max_norm: float) -> Tensor:
        trainer.accelerator.unscale_gradients()
        self.losses.append(self._heard)
        self._heard = 0.0
        bare = trainer.accelerator.unwrap_model(model)
        found = {name: p for name, p in bare.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(found.values(), math.inf if self.keeps_gradients else max_norm)
        if self.keeps_gradients:
            self.gradients = {name: p.grad for name, p in found.items() if p.grad is not None}
            for p in found.values():
                p.grad = None  # an optimizer leaves a parameter without gradient alone
        return norm


@dataclass(kw_only=True)
class TrialTrainer:
    """Makes the run's own trainer for other rows than the run's.

    Attributes:
        job: The training that is about to start.
        make_trainer: ``finetune.train.trainer.make_trainer``: the trainer that will train.
        folder: Rows and checkpoints of a trial go into a folder in it that is deleted again.
    """

    job: TrainingJob
    make_trainer: MakeTrainer
    folder: Path

    @cached_property
    def look(self) -> tuple[Any, int]:
        """The collator that will make the run's micro-batches, and the tokens that the run will read, about."""
        with TemporaryDirectory(dir=self.folder) as work, untouched(self.job.trainable.model):
            trainer = self._make(Path(work), self.job, listener=GradientRecorder(keeps_gradients=False))
            arguments = trainer.args
            rows = arguments.max_steps * arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size
            return trainer.data_collator, round(rows * self.job.data.tokens / self.job.data.packed_rows)

    def gradients(self, rows: Sequence[dict[str, Any]], *, micro_batch: int) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one optimizer step over all rows.

        Args:
            rows: As they are in data/train.
            micro_batch: Rows at once; the rest is accumulated.
        """
        listener = GradientRecorder(keeps_gradients=True)
        with (
            without_dropout(self.job.trainable.model),
            self.trained(rows, micro_batch=micro_batch, steps=1, listener=listener),
        ):
            pass
        return listener.losses[0], listener.gradients

    @contextlib.contextmanager
    def trained(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        micro_batch: int,
        steps: int,
        listener: GradientRecorder,
        callbacks: Sequence[TrainerCallback] = (),
        heldout: Sequence[dict[str, Any]] = (),
        **events: int,
    ) -> Iterator[Path]:
        """The model after some optimizer steps over these rows; before and after, it is what it was.

        Args:
            rows: Every step reads all of them.
            micro_batch: Rows at once.
            steps: At most; a callback may stop earlier.
            listener: Hears losses and gradients.
            callbacks: Of transformers.
            heldout: Rows for an evaluation.
            events: ``evaluations``, ``checkpoints``: how many, evenly spread.

        Returns:
            A folder with checkpoints/, deleted at the end.
        """
        changes: dict[str, Any] = {
            **QUIET,
            "steps": steps,
            "micro_batch": micro_batch,
            "rows_per_step": len(rows),
            **events,
        }
        with TemporaryDirectory(dir=self.folder) as name, untouched(self.job.trainable.model):
            work = Path(name)
            job = dataclasses.replace(
                self.job,
                config=dataclasses.replace(self.job.config, **changes, evaluation_rows=max(1, len(heldout))),
                optim=dataclasses.replace(self.job.optim, **STEADY),
                data=self._written(work, rows, heldout),
            )
            trainer = self._make(work, job, listener=listener, callbacks=callbacks)
            trainer.train()
            yield work

    def _make(self, work: Path, job: TrainingJob, *, listener: GradientRecorder, callbacks: Any = ()) -> Any:
        from finetune.launch.ranks import Ranks

        with contextlib.redirect_stdout(io.StringIO()):  # its log lines are about the trial
            return self.make_trainer(
                job,
                folder=work,
                progress=SimpleNamespace(tokens=0, trained=0),
                guard=listener,
                callbacks=callbacks,
                ranks=Ranks({}),
            )

    def _written(self, work: Path, rows: Sequence[dict[str, Any]], heldout: Sequence[dict[str, Any]]) -> PreparedData:
        from datasets import Dataset

        for name, some in (("train", rows), ("heldout", heldout)):
            if some:
                with contextlib.redirect_stderr(io.StringIO()):  # a bar for a handful of rows
                    Dataset.from_list(list(some)).save_to_disk(str(work / name))
        tokens = sum(sum(row["seq_lengths"]) for row in rows)
        return dataclasses.replace(
            self.job.data, folder=work, tokens=tokens, packed_rows=len(rows), heldout_rows=len(heldout)
        )


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Afterwards the trainable weights are as before to the bit, and what trainers wrapped around the model is off again."""
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    attributes = [(module, dict(vars(module))) for module in (model, unwrap(model))]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, old in before:
                parameter.data = parameter.data.to(old.dtype).copy_(old)
            for module, own in attributes:  # a forward pass in autocast, or TRL's; marks of being prepared
                vars(module).clear()
                vars(module).update(own)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout draws another mask for each layout of the same rows."""
    before = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    try:
        for module, _ in before:
            module.p = 0.0
        yield
    finally:
        for module, rate in before:
            module.p = rate
