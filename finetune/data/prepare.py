"""The verb: rows on disk in, token ids with masks and a ledger out."""

import sys
from pathlib import Path
from typing import Any

from finetune.data.config import DataConfig
from finetune.products import PreparedData


def prepare(config: DataConfig, *, folder: Path, tokenizer: Any, seed: int) -> PreparedData:
    """Reads, renders, tokenises, marks, checks, splits and packs; says what it decided.

    Args:
        folder: Gets ``train/``, ``heldout/``, ``ledger.parquet``, ``rendering.json``, ``lengths.json`` and ``preview.html``.
        tokenizer: A fast tokenizer; gets ``config.template`` where that is given.
        seed: Decides the split, the mix and the order of the packed rows.

    Returns:
        Where they lie, and the counts.

    Raises:
        DataError: Something the user can mend, with its place.
    """
    from finetune.data import pipeline

    return pipeline.run(config, folder=folder, tokenizer=tokenizer, seed=seed)


def explain(folder: Path, where: str, tokenizer: Any) -> None:
    """Prints one input row's fate, with its text, what is learnt of it, and its token ids.

    Args:
        folder: A prepared folder.
        where: ``train.jsonl:137``, or the ledger's row number.

    Raises:
        DataError: Nothing was prepared there, or no such row was read.
    """
    from finetune.data.show import explain as explaining

    sys.stdout.write(explaining.explain(folder, where, tokenizer) + "\n")
