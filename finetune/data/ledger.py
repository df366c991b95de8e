"""The ledger: one line per input row with its source, its fate and the reason."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from finetune.data.pack import Packs
from finetune.data.render import REWRITTEN
from finetune.data.row_flags import FLAGS
from finetune.data.select import SPLITS, Selection
from finetune.data.sources import Source
from finetune.data.store import TokenStore
from finetune.data.worker import CHOSEN

FILE = "ledger.parquet"
BATCH_ROWS = 50_000
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
)


def write_ledger(
    folder: Path, store: TokenStore, selection: Selection, sources: list[Source], *, train: Packs, heldout: np.ndarray
) -> None:
    """Writes ``ledger.parquet``.

    Args:
        train: Position of each training document; a row in several pieces has the position of its first one.
        heldout: Documents of the held-out split, in order; their ``pack`` is the position in this order.
    """
    columns = _columns(store, selection, train=train, heldout=heldout)
    names = [source.name for source in sources]
    with pyarrow.parquet.ParquetWriter(folder / FILE, SCHEMA, compression="zstd") as writer:
        for start in range(0, max(len(store.rows), 1), BATCH_ROWS):
            batch = slice(start, start + BATCH_ROWS)
            writer.write_table(_table(store, names, {name: column[batch] for name, column in columns.items()}))


def _columns(store: TokenStore, selection: Selection, *, train: Packs, heldout: np.ndarray) -> dict[str, np.ndarray]:
    rows, documents, count = store.rows, store.documents, len(store.rows)
    pack, position = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int32)
    sizes = documents["length"][train.documents]
    before = np.cumsum(sizes) - sizes
    pack_of = np.repeat(np.arange(len(train)), np.diff(train.starts))
    offsets = before - before[train.starts[:-1]][pack_of] if len(sizes) else before
    first = _is_first_piece(documents)[train.documents]
    owners = documents["row"][train.documents][first]
    pack[owners], position[owners] = pack_of[first], offsets[first]
    pack[documents["row"][heldout]], position[documents["row"][heldout]] = np.arange(len(heldout)), 0
    chosen = documents[documents["role"] == CHOSEN]
    tokens = np.bincount(chosen["row"], weights=chosen["length"], minlength=count).astype(np.int64)
    trained = np.bincount(chosen["row"], weights=chosen["trained"], minlength=count).astype(np.int64)
    kept = selection.split > 0
    return {
        "row": np.arange(count),
        "source": rows["source"],
        "line": rows["line"],
        "fate": np.where(kept, 0, np.where(selection.duplicate_of >= 0, 2, 1)).astype(np.int16),
        "reason": rows["reason"],
        "duplicate_of": selection.duplicate_of,
        "truncated_by": np.where(kept, rows["truncated_by"], 0),
        "split": selection.split,
        "pack": pack,
        "position": position,
        "pieces": np.where(kept, rows["pieces"], 0),
        "tokens": np.where(kept, tokens, 0),
        "trained_tokens": np.where(kept, trained, 0),
        "full_tokens": rows["full_tokens"],
    }


def _is_first_piece(documents: np.ndarray) -> np.ndarray:
    """Returns whether each document is the first of its row."""
    rows = documents["row"]
    return np.concatenate([[True], rows[1:] != rows[:-1]]) if len(rows) else np.zeros(0, bool)


def _table(store: TokenStore, names: list[str], columns: dict[str, np.ndarray]) -> pyarrow.Table:
    labels = {"source": names, "fate": [KEPT, DROPPED, DUPLICATE], "reason": ["", *store.reasons], "split": SPLITS}
    arrays: list[Any] = []
    for field in SCHEMA:
        if field.name == "detail":
            details = [store.details.get(int(row), "") for row in columns["row"]]
            arrays.append(pyarrow.array(details, pyarrow.string()))
        elif field.name in labels:
            codes = pyarrow.array(columns[field.name].astype(np.int16))
            texts = pyarrow.array(list(labels[field.name]), pyarrow.string())
            arrays.append(pyarrow.DictionaryArray.from_arrays(codes, texts))
        else:
            arrays.append(pyarrow.array(columns[field.name]).cast(field.type))
    return pyarrow.table(arrays, schema=SCHEMA)


def count_rows(store: TokenStore, selection: Selection) -> dict[str, Any]:
    """Counts the input rows by fate: ``in`` = ``kept`` + the sum of ``dropped`` + ``duplicate``.

    ``rewritten`` of the kept ones are conversations whose earlier turns the chat template rewrites; each of their
    ``rewritten_pieces`` is rendered as serving does at its turn.
    """
    of_reason = np.bincount(store.rows["reason"], minlength=len(store.reasons) + 1)
    kept = selection.split > 0
    rewritten = kept & (store.rows["flags"] & FLAGS[REWRITTEN] > 0)
    return {
        "in": len(store.rows),
        "kept": int(kept.sum()),
        "dropped": {text: int(of_reason[number]) for number, text in enumerate(store.reasons, 1) if of_reason[number]},
        "truncated": int((store.rows["truncated_by"][kept] > 0).sum()),
        "duplicate": int((selection.duplicate_of >= 0).sum()),
        "rewritten": int(rewritten.sum()),
        "rewritten_pieces": int(store.rows["pieces"][rewritten].sum()),
    }


def find_rows(folder: Path, where: str) -> Iterator[dict[str, Any]]:
    """Yields the ledger's lines about one source line.

    Args:
        where: ``train.jsonl:137``, or ``:5`` or ``5`` for the ledger's own row number.
    """
    name, _, line = where.rpartition(":")
    table = pyarrow.parquet.ParquetFile(folder / FILE)
    for batch in table.iter_batches(batch_size=BATCH_ROWS):
        lines = batch.column("row" if not name else "line").to_numpy()
        for number in np.flatnonzero(lines == int(line)):
            row = batch.slice(int(number), 1).to_pylist()[0]
            if not name or row["source"] == name or Path(row["source"]).name == Path(name).name:
                yield row
