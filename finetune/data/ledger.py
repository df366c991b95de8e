"""One line per input row: where it came from, what became of it, and why."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from finetune.data.pack import Packs
from finetune.data.select import SPLITS, Selection
from finetune.data.sources import Source
from finetune.data.store import Store
from finetune.data.worker import CHOSEN

FILE = "ledger.parquet"
ROWS_AT_ONCE = 50_000
KEPT, DROPPED, DUPLICATE = "kept", "dropped", "duplicate"
SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("source", pyarrow.dictionary(pyarrow.int16(), pyarrow.string())),
        ("line", pyarrow.int64()),
        ("fate", pyarrow.dictionary(pyarrow.int16(), pyarrow.string())),
        ("reason", pyarrow.dictionary(pyarrow.int16(), pyarrow.string())),
        ("detail", pyarrow.string()),
        ("duplicate_of", pyarrow.int64()),
        ("truncated_by", pyarrow.int32()),
        ("split", pyarrow.dictionary(pyarrow.int16(), pyarrow.string())),
        ("pack", pyarrow.int64()),
        ("position", pyarrow.int32()),
        ("pieces", pyarrow.int32()),
        ("tokens", pyarrow.int64()),
        ("trained_tokens", pyarrow.int64()),
        ("full_tokens", pyarrow.int64()),
    ]
)  # fmt: skip


def write(
    folder: Path, store: Store, selection: Selection, sources: list[Source], *, train: Packs, heldout: np.ndarray
) -> None:
    """Writes ``ledger.parquet``.

    Args:
        train: Where each training document lies; a row in several pieces is listed at its first.
        heldout: Documents of the held-out split, in order; their ``pack`` is the position in it.
    """
    columns = _columns(store, selection, train=train, heldout=heldout)
    names = [source.name for source in sources]
    with pyarrow.parquet.ParquetWriter(folder / FILE, SCHEMA, compression="zstd") as writer:
        for first in range(0, max(len(store.rows), 1), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            writer.write_table(_table(store, names, {name: column[some] for name, column in columns.items()}))


def _columns(store: Store, selection: Selection, *, train: Packs, heldout: np.ndarray) -> dict[str, np.ndarray]:
    rows, documents, count = store.rows, store.documents, len(store.rows)
    pack, position = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int32)
    sizes = documents["length"][train.documents]
    before = np.cumsum(sizes) - sizes
    which = np.repeat(np.arange(len(train)), np.diff(train.starts))
    offsets = before - before[train.starts[:-1]][which] if len(sizes) else before
    first = _first_pieces(documents)
    of_train = first[train.documents]
    owners = documents["row"][train.documents][of_train]
    pack[owners], position[owners] = which[of_train], offsets[of_train]
    pack[documents["row"][heldout]], position[documents["row"][heldout]] = np.arange(len(heldout)), 0
    mine = documents["role"] == CHOSEN
    tokens = np.bincount(documents["row"][mine], weights=documents["length"][mine], minlength=count).astype(np.int64)
    trained = np.bincount(documents["row"][mine], weights=documents["trained"][mine], minlength=count).astype(np.int64)
    kept = selection.split > 0
    fate = np.where(kept, 0, np.where(selection.duplicate_of >= 0, 2, 1)).astype(np.int16)
    return {
        "row": np.arange(count), "source": rows["source"], "line": rows["line"], "fate": fate, "reason": rows["reason"],
        "duplicate_of": selection.duplicate_of, "truncated_by": np.where(kept, rows["truncated_by"], 0), "split": selection.split,
        "pack": pack, "position": position, "pieces": np.where(kept, rows["pieces"], 0), "tokens": np.where(kept, tokens, 0),
        "trained_tokens": np.where(kept, trained, 0), "full_tokens": rows["full_tokens"],
    }  # fmt: skip


def _first_pieces(documents: np.ndarray) -> np.ndarray:
    """Whether each document is the first of its row."""
    return (
        np.concatenate([[True], documents["row"][1:] != documents["row"][:-1]]) if len(documents) else np.zeros(0, bool)
    )


def _table(store: Store, names: list[str], columns: dict[str, np.ndarray]) -> pyarrow.Table:
    words = {"source": names, "fate": [KEPT, DROPPED, DUPLICATE], "reason": ["", *store.reasons], "split": list(SPLITS)}
    arrays: dict[str, Any] = {}
    for field in SCHEMA:
        if field.name == "detail":
            arrays["detail"] = pyarrow.array(
                [store.details.get(int(row), "") for row in columns["row"]], pyarrow.string()
            )
        elif field.name in words:
            codes = pyarrow.array(columns[field.name].astype(np.int16))
            arrays[field.name] = pyarrow.DictionaryArray.from_arrays(
                codes, pyarrow.array(words[field.name], pyarrow.string())
            )
        else:
            arrays[field.name] = pyarrow.array(columns[field.name]).cast(field.type)
    return pyarrow.table(list(arrays.values()), schema=SCHEMA)


def counts(store: Store, selection: Selection) -> dict[str, Any]:
    """``in`` = ``kept`` + the sum of ``dropped`` + ``duplicate``."""
    reasons = store.rows["reason"]
    of_reason = np.bincount(reasons, minlength=len(store.reasons) + 1)
    kept = selection.split > 0
    return {
        "in": len(store.rows),
        "kept": int(kept.sum()),
        "dropped": {text: int(of_reason[number]) for number, text in enumerate(store.reasons, 1) if of_reason[number]},
        "truncated": int((store.rows["truncated_by"][kept] > 0).sum()),
        "duplicate": int((selection.duplicate_of >= 0).sum()),
    }


def find(folder: Path, where: str) -> Iterator[dict[str, Any]]:
    """Ledger lines of one source line.

    Args:
        where: ``train.jsonl:137``, or ``:5`` or ``5`` for the ledger's own row number.
    """
    name, _, line = where.rpartition(":")
    table = pyarrow.parquet.ParquetFile(folder / FILE)
    for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
        lines = batch.column("row" if not name else "line").to_numpy()
        for number in np.flatnonzero(lines == int(line)):
            row = batch.slice(int(number), 1).to_pylist()[0]
            if not name or row["source"] == name or Path(row["source"]).name == Path(name).name:
                yield row
