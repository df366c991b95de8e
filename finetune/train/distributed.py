"""What several processes do about one trainer and one evaluation."""

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
    """Prepares one trainer of several processes.

    accelerate puts a model that is only evaluated under autocast and into no wrapper; DistributedDataParallel would have
    to see the forward pass, which quick steps do not go through. TRL gathers metrics in each micro-batch, which nobody
    reads, and where a process without rows takes no part.
    """
    trainer.accelerator.prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
    trainer.accelerator.gather_for_metrics = lambda tensor: tensor
    broadcast_parameters(parameter for parameter in model.parameters() if parameter.requires_grad)
    if not ranks.is_main:
        set_seed(seed + ranks.rank)  # other dropout for other rows


def distributed_row_losses(
    model: Any, rows: Sequence[dict[str, Any]], *, batch_tokens: int, ranks: Ranks
) -> list[RowLoss]:
    """`row_losses` of all rows in all processes, each of which computes its share."""
    shares = [rows[rank :: ranks.count] for rank in range(ranks.count)]
    own = row_losses(model, shares[ranks.rank], batch_tokens=batch_tokens)
    if ranks.shards:
        passes = [len(token_batches(share, batch_tokens=batch_tokens)) for share in shares]
        join_collectives(model.get_base_model(), passes=max(passes) - passes[ranks.rank])
    found = ranks.all_gather([dataclasses.astuple(row) for row in own])
    return [RowLoss(*found[number % len(found)][number // len(found)]) for number in range(len(rows))]
