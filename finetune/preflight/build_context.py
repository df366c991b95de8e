"""Chooses what the proofs are tried on, and lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import load_from_disk

from finetune.errors import TrainError
from finetune.preflight.batch import as_rows, documents, first_rows, largest_rows, shortened, uneven
from finetune.preflight.context import Bench
from finetune.preflight.trial import Trial

if TYPE_CHECKING:
    from datasets import Dataset

    from finetune.data import PreparedData
    from finetune.hardware import Placement
    from finetune.kernels import Fusion
    from finetune.lora import LoraConfig
    from finetune.model import Base
    from finetune.preflight.config import PreflightConfig, UpcomingRun

MOST_TOKENS = 640
"""Tokens of the small batch at most: plain gradients take more memory than training does."""

FEW_TOKENS = 32
"""Of a row that is accumulated on the small batch: what matters is how losses are added up."""

LOOKED_AT = 64
"""Rows from which the small batch is taken."""


def make_context(
    config: PreflightConfig,
    *,
    folder: Path,
    run: Path,
    adapted: Any,
    tokenizer: Any,
    data: PreparedData,
    base: Base,
    lora: LoraConfig,
    upcast: str,
    placement: Placement,
    quick: Fusion,
    seed: int,
    ahead: UpcomingRun | None,
) -> Bench:
    """The bench for a level; see `rehearse` for the arguments, ``folder`` apart: what is written on the way goes there.

    Raises:
        TrainError: There is no row.
    """
    rows = load_from_disk(str(data.folder / "train"))
    if not len(rows):
        raise TrainError("data: no row is left to train on; `finetune data` shows where they went")
    pairs = ahead is not None and ahead.train.objective != "sft"
    tried = chosen(config, rows, micro_batch=ahead.train.micro_batch if ahead else 1, pairs=pairs)
    inputs = {
        "model": adapted,
        "tokenizer": tokenizer,
        "lora": lora,
        "placement": placement,
        "upcast": upcast,
        "quick": quick,
        "seed": seed,
    }
    trial = Trial(ahead=ahead, folder=folder, inputs=inputs, data=data) if ahead else None
    return Bench(
        config=config, model=adapted, tokenizer=tokenizer, data=data, quick=quick, step0_bound=lora.step0_bound, base=base,
        placement=placement, seed=seed, run=run, folder=folder, trial=trial, **tried,
    )  # fmt: skip


def chosen(config: PreflightConfig, rows: Dataset, *, micro_batch: int, pairs: bool) -> dict[str, Any]:
    """``documents``, ``beside``, ``rows`` and ``accumulated`` of a `Bench`."""
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
