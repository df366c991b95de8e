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
    names = [source.name for source in sources]
    places = _places(store, train, heldout)
    with pyarrow.parquet.ParquetWriter(folder / FILE, SCHEMA, compression="zstd") as writer:
        for part in store.slices(len(store.rows), BATCH_ROWS):
            writer.write_table(_table(store, names, _columns(store, selection, places, part)))


def _places(store: TokenStore, train: Packs, heldout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each row's pack, and the position of its first document in it; -1 for rows that are in none."""
    pack, position = (store.array(dtype, len(store.rows), fill=-1) for dtype in (np.int64, np.int32))
    for part in store.slices(len(train)):
        documents, starts = train.part(part)
        rows, sizes = store.documents["row"][documents], store.documents["length"][documents]
        before = np.cumsum(sizes) - sizes
        pack_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        first = store.first_documents[rows] == documents
        pack[rows[first]] = part.start + pack_of[first]
        position[rows[first]] = (before - before[starts[:-1]][pack_of])[first]
    for part in store.slices(len(heldout)):
        rows = store.documents["row"][heldout[part]]
        pack[rows], position[rows] = np.arange(part.start, part.stop), 0
    return pack, position


def _columns(
    store: TokenStore, selection: Selection, places: tuple[np.ndarray, np.ndarray], part: slice
) -> dict[str, np.ndarray]:
    rows, count = store.rows[part], part.stop - part.start
    documents = store.documents[store.documents_of(part)]
    chosen = documents[documents["role"] == CHOSEN]
    tokens, trained = (
        np.bincount(chosen["row"] - part.start, weights=chosen[name], minlength=count).astype(np.int64)
        for name in ("length", "trained")
    )
    kept = selection.split[part] > 0
    duplicate_of = selection.duplicate_of[part]
    return {
        "row": np.arange(part.start, part.stop),
        "source": rows["source"],
        "line": rows["line"],
        "fate": np.where(kept, 0, np.where(duplicate_of >= 0, 2, 1)).astype(np.int16),
        "reason": rows["reason"],
        "duplicate_of": duplicate_of,
        "truncated_by": np.where(kept, rows["truncated_by"], 0),
        "split": selection.split[part],
        "pack": places[0][part],
        "position": places[1][part],
        "pieces": np.where(kept, rows["pieces"], 0),
        "tokens": np.where(kept, tokens, 0),
        "trained_tokens": np.where(kept, trained, 0),
        "full_tokens": rows["full_tokens"],
    }


def _table(store: TokenStore, names: list[str], columns: dict[str, np.ndarray]) -> pyarrow.Table:
    labels = {"source": names, "fate": [KEPT, DROPPED, DUPLICATE], "reason": ["", *store.reasons], "split": SPLITS}
    rows = columns["row"].tolist()
    details = store.details(rows[0], rows[-1] + 1)
    arrays: list[Any] = []
    for field in SCHEMA:
        if field.name == "detail":
            arrays.append(pyarrow.array([details.get(row, "") for row in rows], pyarrow.string()))
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
    of_reason = store.count_reasons()
    counts = dict.fromkeys(("kept", "truncated", "duplicate", "rewritten", "rewritten_pieces"), 0)
    for part in store.row_slices():
        rows, kept = store.rows[part], selection.split[part] > 0
        rewritten = kept & (rows["flags"] & FLAGS[REWRITTEN] > 0)
        counts["kept"] += int(kept.sum())
        counts["truncated"] += int((rows["truncated_by"][kept] > 0).sum())
        counts["duplicate"] += int((selection.duplicate_of[part] >= 0).sum())
        counts["rewritten"] += int(rewritten.sum())
        counts["rewritten_pieces"] += int(rows["pieces"][rewritten].sum())
    dropped = {text: int(of_reason[number]) for number, text in enumerate(store.reasons, 1) if of_reason[number]}
    return {"in": len(store.rows), "kept": counts.pop("kept"), "dropped": dropped, **counts}


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
