"""Training and evaluation with several processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from finetune.inference.losses import RowLoss, row_losses
from finetune.inference.rows import token_batches
from finetune.launch.gradients import broadcast_parameters
from finetune.launch.shards import join_collectives

if TYPE_CHECKING:
    from finetune.launch.ranks import Ranks


def prepare_distributed(trainer: Any, model: Any, *, ranks: Ranks, seed: int) -> None:
    """Prepares the trainer of one of several processes.

    ``evaluation_mode`` makes accelerate apply autocast and add no wrapper: DistributedDataParallel needs calls of the
    model's own forward pass, which the fused loss skips. TRL gathers metrics in each micro-batch; nothing uses
    them, and gathering them would hang, because a process without rows does not take part.
    """
    trainer.accelerator.prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
    trainer.accelerator.gather_for_metrics = lambda tensor: tensor
    broadcast_parameters(parameter for parameter in model.parameters() if parameter.requires_grad)
    if not ranks.is_main:
        set_seed(seed + ranks.rank)  # other rows need another dropout


def distributed_row_losses(
    model: Any, rows: Sequence[dict[str, Any]], *, batch_tokens: int, ranks: Ranks
) -> list[RowLoss]:
    """Computes `row_losses` of all rows in all processes, each of which evaluates its share."""
    shares = [rows[rank :: ranks.count] for rank in range(ranks.count)]
    losses = row_losses(model, shares[ranks.rank], batch_tokens=batch_tokens)
    if ranks.shards:
        passes = [len(token_batches(share, batch_tokens=batch_tokens)) for share in shares]
        join_collectives(model.get_base_model(), passes=max(passes) - passes[ranks.rank])
    gathered = ranks.all_gather([dataclasses.astuple(row) for row in losses])
    return [RowLoss(*gathered[row % ranks.count][row // ranks.count]) for row in range(len(rows))]
