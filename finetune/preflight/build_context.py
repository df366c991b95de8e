"""Chooses what the proofs are tried on, and lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import load_from_disk

from finetune.errors import TrainError
from finetune.preflight.batch import as_rows, documents, first_rows, largest_rows, shortened, uneven
from finetune.preflight.context import CheckContext
from finetune.preflight.trial import TrialTrainer

if TYPE_CHECKING:
    from datasets import Dataset

    from finetune.preflight.config import PreflightConfig
    from finetune.preflight.trial import MakeTrainer
    from finetune.trainable import TrainingJob

MOST_TOKENS = 640
"""Tokens of the small batch at most: plain gradients take more memory than training does."""

FEW_TOKENS = 32
"""Of a row that is accumulated on the small batch: what matters is how losses are added up."""

LOOKED_AT = 64
"""Rows from which the small batch is taken."""


def make_context(
    config: PreflightConfig, *, folder: Path, run: Path, job: TrainingJob, make_trainer: MakeTrainer | None, until: str
) -> CheckContext:
    """Makes the context of the checks for a level; see `run_preflight` for the arguments.

    Raises:
        TrainError: There is no row.
    """
    rows = load_from_disk(str(job.data.folder / "train"))
    if not len(rows):
        raise TrainError("data: no row is left to train on; `finetune data` shows where they went")
    pairs = job.config.objective != "sft"
    trial = TrialTrainer(job=job, make_trainer=make_trainer, folder=folder) if make_trainer else None
    chosen_rows = chosen(config, rows, micro_batch=job.config.micro_batch if make_trainer else 1, pairs=pairs)
    return CheckContext(config=config, job=job, run=run, folder=folder, until=until, trial=trial, **chosen_rows)


def chosen(config: PreflightConfig, rows: Dataset, *, micro_batch: int, pairs: bool) -> dict[str, Any]:
    """``documents``, ``beside``, ``rows`` and ``accumulated`` of a `CheckContext`."""
    first = first_rows(rows, count=LOOKED_AT)
    small, batch = documents(first)[: config.rows], first[:micro_batch]
    tried = [shortened(document, tokens=MOST_TOKENS // config.rows) for document in small]
    beside, added, room = tried[:2], tried[:2], FEW_TOKENS
    if config.level == "full":
        batch = largest_rows(rows, count=micro_batch)
        tried = documents(batch)
        beside, added = tried if len(tried) > 1 else small, small
        room = max(FEW_TOKENS, sum(len(document["input_ids"]) for document in tried) // len(added))
    accumulated = as_rows(list(uneven([shortened(document, tokens=room) for document in added])))
    if pairs:
        accumulated = sorted(first, key=lambda row: sum(row["seq_lengths"]))[: len(added)]
    return {"documents": tried, "beside": beside, "rows": batch, "accumulated": accumulated}
