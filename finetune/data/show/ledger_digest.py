"""Collects the ledger lines that the preview needs, in one pass and bounded memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from finetune.data.ledger import FILE, KEPT, find_rows

SHOWN_PER_REASON = 3
COLUMNS = [
    *("row", "source", "line", "fate", "reason", "detail", "duplicate_of"),
    *("truncated_by", "pieces", "tokens", "trained_tokens"),
]
COUNTED = ("read", "kept", "tokens", "trained_tokens")


@dataclass(slots=True)
class LedgerDigest:
    """The parts of a ledger that the preview shows.

    Attributes:
        rows: Row number -> line, of the requested rows.
        dropped: Reason -> the first lines of the rows that were dropped for it.
        sources: Source -> the numbers of ``COUNTED``.
    """

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    dropped: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)


def digest_ledger(folder: Path, rows: set[int]) -> LedgerDigest:
    """Reads the ledger of a prepared folder.

    Args:
        rows: Numbers of the rows whose lines are needed.
    """
    digest = LedgerDigest()
    for batch in pyarrow.parquet.ParquetFile(folder / FILE).iter_batches(columns=COLUMNS):
        numbers = batch.column("row").to_numpy()
        for at in np.flatnonzero(np.isin(numbers, list(rows))):
            digest.rows[int(numbers[at])] = _line(batch, int(at))
        texts = pyarrow.table({name: batch.column(name).cast("string") for name in ("source", "fate", "reason")})
        _add_dropped(digest, batch, texts)
        _add_counts(digest, batch, texts)
    for line in digest.dropped.get("duplicate", ()):
        original = next(find_rows(folder, f":{line['duplicate_of']}"))
        line["detail"] = f"of {original['source']}:{original['line']}"
    return digest


def _line(batch: pyarrow.RecordBatch, at: int) -> dict[str, Any]:
    return dict(batch.slice(at, 1).to_pylist()[0])


def _add_dropped(digest: LedgerDigest, batch: pyarrow.RecordBatch, texts: pyarrow.Table) -> None:
    fates, reasons = (texts[name].to_numpy() for name in ("fate", "reason"))
    why = np.where(reasons == "", fates, reasons)
    for reason in np.unique(why[fates != KEPT]):
        lines = digest.dropped.setdefault(str(reason), [])
        for at in np.flatnonzero((why == reason) & (fates != KEPT))[: SHOWN_PER_REASON - len(lines)]:
            lines.append(_line(batch, int(at)))


def _add_counts(digest: LedgerDigest, batch: pyarrow.RecordBatch, texts: pyarrow.Table) -> None:
    table = texts
    for name in ("tokens", "trained_tokens"):
        table = table.append_column(name, batch.column(name))
    sums = [("tokens", "count"), ("tokens", "sum"), ("trained_tokens", "sum")]
    for row in table.group_by(["source", "fate"]).aggregate(sums).to_pylist():
        source = digest.sources.setdefault(row["source"], dict.fromkeys(COUNTED, 0))
        source["read"] += row["tokens_count"]
        source["kept"] += row["tokens_count"] * (row["fate"] == KEPT)
        source["tokens"] += row["tokens_sum"]
        source["trained_tokens"] += row["trained_tokens_sum"]
