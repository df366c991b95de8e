"""The run's own trainer on a handful of rows: what it reports is what training would do, and nothing of it stays."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
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

    from finetune.data import PreparedData
    from finetune.preflight.config import UpcomingRun

QUIET: dict[str, Any] = {
    "epochs": 1.0, "tokens_per_step": None, "group_by_length": False, "neftune_alpha": None, "patience": None, "keep": "last",
    "evaluations": 0, "checkpoints": 0, "log_steps": 1,
}  # fmt: skip
"""Settings of the train group that a trial does not take over: they make noise, or events that it does not ask for."""

STEADY: dict[str, Any] = {"schedule": "constant", "warmup": None, "warmup_steps": 0, "warmup_tokens": None}
"""The optim group's peak rate from the first step on: a handful of steps has no time to warm up."""


class Listener:
    """Stands where training has its guard: between the backward pass and the optimizer.

    Attributes:
        losses: Of each optimizer step, in nats per trained token (sft) or per pair (dpo).
        gradients: Of the last step, before they are clipped; only where asked for, and then the step is not taken.
    """

    def __init__(self, *, keeps_gradients: bool) -> None:
        self.keeps_gradients, self._heard = keeps_gradients, 0.0
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def hear(self, loss: Tensor, *, rows: list[int], inputs: dict[str, Any]) -> Tensor:
        self._heard += float(loss)
        return loss

    def clip(self, trainer: Any, model: nn.Module, *, max_norm: float) -> Tensor:
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
class Trial:
    """Makes trainers for other rows than the run's.

    Attributes:
        ahead: What the run is about to do.
        folder: Rows and checkpoints of a trial go into a folder in it that is deleted again.
        inputs: ``model``, ``tokenizer``, ``lora``, ``placement``, ``upcast``, ``quick`` and ``seed``, as training gets them.
        data: The prepared data.
        packing: Whether documents may share a row.
    """

    ahead: UpcomingRun
    folder: Path
    inputs: dict[str, Any]
    data: PreparedData
    packing: bool = True

    @cached_property
    def look(self) -> tuple[Any, int]:
        """The collator that will make the run's micro-batches, and the tokens that the run will read, about."""
        with TemporaryDirectory(dir=self.folder) as work, untouched(self.inputs["model"]):
            trainer = self._make(
                Path(work),
                self.data,
                config=self.ahead.train,
                optim=self.ahead.optim,
                listener=Listener(keeps_gradients=False),
            )
            arguments = trainer.args
            rows = arguments.max_steps * arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size
            return trainer.data_collator, round(rows * self.data.tokens / self.data.packed_rows)

    def gradients(self, rows: Sequence[dict[str, Any]], *, micro_batch: int) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one optimizer step over all rows.

        Args:
            rows: As they are in data/train.
            micro_batch: Rows at once; the rest is accumulated.
        """
        listener = Listener(keeps_gradients=True)
        with (
            without_dropout(self.inputs["model"]),
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
        listener: Listener,
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
        optim = dataclasses.replace(self.ahead.optim, **STEADY)
        with TemporaryDirectory(dir=self.folder) as name, untouched(self.inputs["model"]):
            work = Path(name)
            data = self._written(work, rows, heldout)
            config = dataclasses.replace(self.ahead.train, **changes, evaluation_rows=max(1, len(heldout)))
            trainer = self._make(work, data, config=config, optim=optim, listener=listener, callbacks=callbacks)
            trainer.train()
            yield work

    def _make(
        self, work: Path, data: PreparedData, *, config: Any, optim: Any, listener: Listener, callbacks: Any = ()
    ) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # its sentences are about the trial
            return self.ahead.make_trainer(
                config, folder=work, data=data, optim=optim, packing=self.packing, counts=SimpleNamespace(tokens=0, trained=0),
                guard=listener, callbacks=callbacks, **self.inputs,
            )  # fmt: skip

    def _written(self, work: Path, rows: Sequence[dict[str, Any]], heldout: Sequence[dict[str, Any]]) -> PreparedData:
        from datasets import Dataset

        for name, some in (("train", rows), ("heldout", heldout)):
            if some:
                with contextlib.redirect_stderr(io.StringIO()):  # a bar for a handful of rows
                    Dataset.from_list(list(some)).save_to_disk(str(work / name))
        tokens = sum(sum(row["seq_lengths"]) for row in rows)
        return dataclasses.replace(
            self.data, folder=work, tokens=tokens, packed_rows=len(rows), heldout_rows=len(heldout)
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
