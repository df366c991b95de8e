"""A loss or gradient that is no number must not reach the optimizer: its step is left out, counted, and explained."""

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
"""Rows that a message names; more would bury the rest of it."""


@dataclass(frozen=True, slots=True)
class CollatorWithRowIds:
    """A collator whose micro-batches also carry the numbers of their rows, ``rows``, for the message of a `NonFiniteGuard`."""

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collate(rows), "rows": [number for row in rows for number in row["rows"]]}


class NonFiniteGuard:
    """Stands between the backward pass and the optimizer.

    Args:
        progress: Receives the number of steps left out.
        limit: ``train.non_finite_steps``.
    """

    def __init__(self, progress: TrainingProgress, *, limit: int) -> None:
        self.progress, self.limit = progress, limit
        self.heard: list[tuple[Tensor, list[int], dict[str, Any]]] = []

    def record_loss(self, loss: Tensor, *, rows: list[int], inputs: dict[str, Any]) -> Tensor:
        """Takes note of a micro-batch.

        Args:
            loss: Its loss, a scalar, after the backward pass.
            rows: Numbers of the data's rows in it.
            inputs: What went into the model.

        Returns:
            The loss; 0 where it is no number, since transformers adds it to a sum that would never recover.
        """
        import torch

        self.heard.append((loss.detach(), rows, inputs))
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))

    def clip_gradients(self, trainer: Any, model: nn.Module, *, max_norm: float) -> Tensor:
        """Scales the gradients down to ``max_norm``, or takes them away where the step must not be taken.

        An optimizer leaves a parameter without gradient alone, its state included. The schedule and the data go on. What
        it does to finite gradients is ``torch.nn.utils.clip_grad_norm_``, which is these two calls.

        Returns:
            The norm before, a scalar.

        Raises:
            TrainError: ``limit`` steps in a row were left out.
        """
        import torch

        trainer.accelerator.unscale_gradients()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        heard, self.heard = self.heard, []
        finite = torch.stack([norm, *(loss.to(norm) for loss, _, _ in heard)]).isfinite().all()
        if trainer.accelerator.num_processes > 1:  # either every process takes the step or none does
            finite = trainer.accelerator.gather(finite[None]).all()
        if finite:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            self.progress.skipped_in_a_row = 0
            return norm
        self._skip(trainer, model, norm=norm, heard=heard)
        for parameter in parameters:
            parameter.grad = None
        return norm

    def _skip(
        self, trainer: Any, model: nn.Module, *, norm: Tensor, heard: list[tuple[Tensor, list[int], dict[str, Any]]]
    ) -> None:
        self.progress.skipped += 1
        scaler = trainer.accelerator.scaler
        if scaler is None or scaler.get_scale() <= 1:  # above it, float16's scaler finds its scale by going too far
            self.progress.skipped_in_a_row += 1
        broken = [one for one in heard if not one[0].isfinite()]
        rows = sorted({row for _, rows, _ in broken or heard for row in rows})
        seen = trainer.ranks.all_gather({"loss": float(broken[0][0]) if broken else None, "rows": rows})
        told = next((one for one in seen if one["loss"] is not None), None)
        what = f"loss is {told['loss']}" if told else f"loss is fine, and the gradient's norm is {float(norm)}"
        read = _listed(told["rows"] if told else sorted({row for one in seen for row in one["rows"]}))
        step = trainer.state.global_step + 1
        log("train", f"step {step} is left out: {what}; it read {read} ({self.progress.skipped} left out so far)")
        if self.progress.skipped_in_a_row < self.limit:
            return
        layer = next((one for one in trainer.ranks.all_gather(self._layer(trainer, model, broken)) if one), None)
        if layer is None:
            layer = (
                "each layer's output is finite, the loss is not"
                if told
                else "every single gradient is finite, their norm is not"
            )
        raise TrainError(
            f"train: {self.progress.skipped_in_a_row} steps in a row had a loss or gradient that is no number, and none of them was taken. "
            f"At step {step} the {what}; {layer}; it read {read}. The adapter of the last good step is in the last checkpoint. "
            "Likely causes: optim.learning_rate is too high, model.dtype=float16 overflows, or those rows: `finetune data --why <row>`"
        )

    def _layer(
        self, trainer: Any, model: nn.Module, broken: list[tuple[Tensor, list[int], dict[str, Any]]]
    ) -> str | None:
        """Where it goes wrong, as far as this process's rows show it."""
        if trainer.ranks.shards:
            return "where it first goes wrong is not looked for with launch=fsdp, since one process alone cannot compute; launch=ddp tells"
        if broken:
            inputs = broken[0][2]
            first = first_broken_output(
                model, lambda: trainer.compute_loss(model, trainer._prepare_inputs(inputs), num_items_in_batch=1)
            )
            return f"the forward pass first goes wrong at {first}" if first else None
        backward = next(broken_gradients(model), None)
        return f"the backward pass first goes wrong at {backward}" if backward else None


def broken_gradients(model: nn.Module) -> Iterator[str]:
    """Parameters whose gradient is not finite, in the order of the backward pass: last layer first."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            yield _short(name)


def first_broken_output(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """The first module whose output is not finite when ``forward`` is run again; the innermost of nested ones."""
    import torch

    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and any(not tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(_short(name))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


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


def _listed(rows: list[int]) -> str:
    if not rows:
        return "rows that the batch does not name"
    shown = ", ".join(str(row) for row in rows[:MOST_ROWS])
    return f"rows {shown}{f' and {len(rows) - MOST_ROWS} more' if len(rows) > MOST_ROWS else ''}"
