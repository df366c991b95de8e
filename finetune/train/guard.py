"""A non-finite loss or gradient skips the step: it is counted, explained, and does not reach the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import TrainError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.train.progress import TrainingProgress

MOST_ROWS = 20
"""Rows that a message lists; more would hide the rest of the message."""


@dataclass(frozen=True, slots=True)
class CollatorWithRowIds:
    """A collator that adds the ledger numbers of the rows, ``rows``, for the messages of `NonFiniteGuard`."""

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collate(rows), "rows": [number for row in rows for number in row["rows"]]}


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch whose backward pass is done.

    Attributes:
        loss: A scalar.
        rows: Ledger numbers of its rows.
        inputs: The model's inputs.
    """

    loss: Tensor
    rows: list[int]
    inputs: dict[str, Any]


class NonFiniteGuard:
    """Runs between the backward pass and the optimizer.

    Args:
        progress: Receives the number of skipped steps.
        limit: ``train.non_finite_steps``.
    """

    def __init__(self, progress: TrainingProgress, *, limit: int) -> None:
        self.progress, self.limit = progress, limit
        self.micro_batches: list[MicroBatch] = []

    def record_loss(self, loss: Tensor, *, rows: list[int], inputs: dict[str, Any]) -> Tensor:
        """Records a micro-batch of the current step.

        Args:
            loss: Its loss, a scalar, after the backward pass.
            rows: Ledger numbers of its rows.
            inputs: The model's inputs.

        Returns:
            The loss; 0 where it is non-finite, because transformers adds it to a sum that would stay non-finite.
        """
        import torch

        self.micro_batches.append(MicroBatch(loss.detach(), rows, inputs))
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))

    def clip_gradients(self, trainer: Any, model: nn.Module, *, max_norm: float) -> Tensor:
        """Scales the gradients down to ``max_norm``, or removes them where the step must be skipped.

        An optimizer does not change a parameter without a gradient, nor its state. The learning rate schedule and the
        data advance all the same. Finite gradients are clipped as by ``torch.nn.utils.clip_grad_norm_``, which makes
        the same two calls.

        Returns:
            The norm before clipping, a scalar.

        Raises:
            TrainError: ``limit`` steps in a row were skipped.
        """
        import torch

        trainer.accelerator.unscale_gradients()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        step, self.micro_batches = self.micro_batches, []
        finite = torch.stack([norm, *(micro_batch.loss.to(norm) for micro_batch in step)]).isfinite().all()
        if trainer.accelerator.num_processes > 1:  # either every process takes the step or none does
            finite = trainer.accelerator.gather(finite[None]).all()
        if finite:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            self.progress.skipped_in_a_row = 0
            return norm
        self._skip(trainer, model, norm=norm, step=step)
        for parameter in parameters:
            parameter.grad = None
        return norm

    def _skip(self, trainer: Any, model: nn.Module, *, norm: Tensor, step: list[MicroBatch]) -> None:
        self.progress.skipped += 1
        scaler = trainer.accelerator.scaler
        if scaler is None or scaler.get_scale() <= 1:  # above 1, float16's loss scaler is still searching its scale
            self.progress.skipped_in_a_row += 1
        broken = [micro_batch for micro_batch in step if not micro_batch.loss.isfinite()]
        rows = sorted({row for micro_batch in broken or step for row in micro_batch.rows})
        reports = trainer.ranks.all_gather({"loss": float(broken[0].loss) if broken else None, "rows": rows})
        culprit = next((report for report in reports if report["loss"] is not None), None)
        if culprit:
            what, read = f"loss is {culprit['loss']}", culprit["rows"]
        else:
            what = f"loss is finite, and the gradient's norm is {float(norm)}"
            read = sorted({row for report in reports for row in report["rows"]})
        number = trainer.state.global_step + 1
        skipped = f"{self.progress.skipped} skipped so far"
        log("train", f"step {number} is skipped: {what}; it read {_row_list(read)} ({skipped})")
        if self.progress.skipped_in_a_row < self.limit:
            return
        places = trainer.ranks.all_gather(self._first_broken_layer(trainer, model, broken))
        place = next((place for place in places if place), None)
        if place is None:
            place = "each gradient is finite, their norm is not"
            if culprit:
                place = "each layer's output is finite, the loss is not"
        raise TrainError(
            f"train: {self.progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient and were "
            f"skipped. At step {number} the {what}; {place}; it read {_row_list(read)}. "
            "The adapter of the last good step is in the last checkpoint. Likely causes: optim.learning_rate is too "
            "high, model.dtype=float16 overflows, or those rows: `finetune data --why <row>`"
        )

    def _first_broken_layer(self, trainer: Any, model: nn.Module, broken: list[MicroBatch]) -> str | None:
        """Returns where the first non-finite value appears, as far as this process's rows show it."""
        if trainer.ranks.shards:
            return (
                "launch=fsdp does not search for the first non-finite layer, because one process alone cannot compute; "
                "launch=ddp does"
            )
        if broken:
            inputs = broken[0].inputs
            layer = first_broken_output(
                model, lambda: trainer.compute_loss(model, trainer._prepare_inputs(inputs), num_items_in_batch=1)
            )
            return f"the forward pass first goes wrong at {layer}" if layer else None
        parameter = next(broken_gradients(model), None)
        return f"the backward pass first goes wrong at {parameter}" if parameter else None


def broken_gradients(model: nn.Module) -> Iterator[str]:
    """Yields the parameters whose gradient is not finite, in the order of the backward pass: last layer first."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            yield _short(name)


def first_broken_output(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Runs ``forward`` and returns the first module whose output is not finite; the innermost of nested ones."""
    import torch

    broken: list[str] = []

    def checker(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not broken and any(not tensor.isfinite().all() for tensor in _tensors(output)):
                broken.append(_short(name))

        return hook

    handles = [module.register_forward_hook(checker(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return broken[0] if broken else None


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".default.weight").removesuffix(".default")


def _row_list(rows: list[int]) -> str:
    if not rows:
        return "rows that the batch does not name"
    shown = ", ".join(str(row) for row in rows[:MOST_ROWS])
    return f"rows {shown}{f' and {len(rows) - MOST_ROWS} more' if len(rows) > MOST_ROWS else ''}"
