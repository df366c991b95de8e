"""What the preview needs of the ledger, gathered in one pass without holding it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from finetune.data.ledger import FILE, KEPT, find

GONE_PER_REASON = 3
COLUMNS = [
    "row", "source", "line", "fate", "reason", "detail", "duplicate_of", "truncated_by", "pieces", "tokens", "trained_tokens",
]  # fmt: skip
COUNTED = ("read", "kept", "tokens", "trained_tokens")


@dataclass(slots=True)
class Lines:
    """A digest of the ledger.

    Attributes:
        rows: The lines of the rows that were asked for, by number.
        gone: The first lines of every reason why rows were left out.
        sources: By source: ``COUNTED``, in rows and tokens.
    """

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    gone: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)


def gather(folder: Path, wanted: set[int]) -> Lines:
    """Reads the ledger of a prepared folder.

    Args:
        wanted: Rows whose lines are needed.
    """
    lines = Lines()
    for batch in pyarrow.parquet.ParquetFile(folder / FILE).iter_batches(columns=COLUMNS):
        numbers = batch.column("row").to_numpy()
        for at in np.flatnonzero(np.isin(numbers, list(wanted))):
            lines.rows[int(numbers[at])] = _line(batch, int(at))
        plain = pyarrow.table({name: batch.column(name).cast("string") for name in ("source", "fate", "reason")})
        _gather_gone(lines, batch, plain)
        _count(lines, batch, plain)
    for line in lines.gone.get("duplicate", ()):
        original = next(find(folder, f":{line['duplicate_of']}"))
        line["detail"] = f"of {original['source']}:{original['line']}"
    return lines


def _line(batch: pyarrow.RecordBatch, at: int) -> dict[str, Any]:
    return dict(batch.slice(at, 1).to_pylist()[0])


def _gather_gone(lines: Lines, batch: pyarrow.RecordBatch, plain: pyarrow.Table) -> None:
    fates, reasons = (plain[name].to_numpy() for name in ("fate", "reason"))
    why = np.where(reasons == "", fates, reasons)
    for reason in np.unique(why[fates != KEPT]):
        found = lines.gone.setdefault(str(reason), [])
        for at in np.flatnonzero((why == reason) & (fates != KEPT))[: GONE_PER_REASON - len(found)]:
            found.append(_line(batch, int(at)))


def _count(lines: Lines, batch: pyarrow.RecordBatch, plain: pyarrow.Table) -> None:
    table = plain.append_column("tokens", batch.column("tokens")).append_column(
        "trained_tokens", batch.column("trained_tokens")
    )
    grouped = table.group_by(["source", "fate"]).aggregate(
        [("tokens", "count"), ("tokens", "sum"), ("trained_tokens", "sum")]
    )
    for row in grouped.to_pylist():
        source = lines.sources.setdefault(row["source"], dict.fromkeys(COUNTED, 0))
        source["read"] += row["tokens_count"]
        source["kept"] += row["tokens_count"] * (row["fate"] == KEPT)
        source["tokens"] += row["tokens_sum"]
        source["trained_tokens"] += row["trained_tokens_sum"]
