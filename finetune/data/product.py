"""What the stages after this one get."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Token ids with masks, on disk.

    Attributes:
        folder: ``train/`` and ``heldout/`` open with ``datasets.load_from_disk``; ``ledger.parquet`` has one line per
            input row; ``rendering.json`` says how conversations were written; ``preview.html`` shows some.
        rows: ``in`` = ``kept`` + the sum of ``dropped`` (by reason) + ``duplicate``; ``truncated`` are among the kept.
        tokens: Tokens in training documents.
        trained_tokens: Those of them that carry loss.
        packed_rows: Rows of ``train/``.
        train_rows: Input rows that are trained on.
        heldout_rows: Input rows kept for evaluation.
        longest: Tokens of the longest row of ``train/``.
        fingerprint: Hash of the data, template, tokenizer, settings and code.
        warnings: One sentence each.
        lengths: Quantiles, histogram, and what each threshold would cut.
        sources: What was read, by name: files without their folders, data sets on the hub with their revision.
    """

    folder: Path
    rows: dict[str, Any]
    tokens: int
    trained_tokens: int
    packed_rows: int
    train_rows: int
    heldout_rows: int
    longest: int
    fingerprint: str
    warnings: list[str]
    lengths: dict[str, Any]
    sources: list[str] = field(default_factory=list)
