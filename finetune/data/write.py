"""Arrow files that ``datasets.load_from_disk`` opens, written without loading ``datasets``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from finetune.data.pack import Packs
from finetune.data.store import Store
from finetune.data.worker import REJECTED

ROWS_AT_ONCE = 256
LIST = "list"
OTHER_FIELDS = {"rejected_input_ids": LIST, "rejected_labels": LIST, "desirable": "int32"}
"""What preference objectives read besides; empty lists where a row has no rejected answer."""


def train(folder: Path, store: Store, packs: Packs, *, preference: bool, fingerprint: str) -> None:
    """``input_ids``, ``labels``, ``seq_lengths``, ``rows``; for preference objectives the rejected answers too."""
    fields = {"input_ids": LIST, "labels": LIST, "seq_lengths": LIST, "rows": LIST}
    if preference:
        fields |= OTHER_FIELDS
    _write(folder, fields, _train_batches(store, packs, preference=preference), fingerprint=f"{fingerprint}-train")


def _train_batches(store: Store, packs: Packs, *, preference: bool) -> Iterator[dict[str, Any]]:
    rejected = _rejected(store) if preference else {}
    for first in range(0, len(packs), ROWS_AT_ONCE):
        borders = packs.starts[first : first + ROWS_AT_ONCE + 1]
        documents = packs.documents[borders[0] : borders[-1]]
        ids, labels = store.gather(documents)
        lengths = store.documents["length"][documents]
        tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[borders - borders[0]]
        rows = store.documents["row"][documents]
        columns = {
            "input_ids": _lists(ids, tokens),
            "labels": _lists(labels, tokens),
            "seq_lengths": _lists(lengths, borders - borders[0]),
            "rows": _lists(rows, borders - borders[0]),
        }
        if preference:
            columns |= _others(store, rejected, rows)
        yield columns


def _others(store: Store, rejected: dict[int, int], rows: np.ndarray) -> dict[str, Any]:
    """`OTHER_FIELDS` of some rows."""
    others = np.array([number for row in rows if (number := rejected.get(int(row), -1)) >= 0], dtype=np.int64)
    there = np.array([int(row) in rejected for row in rows], dtype=bool)
    lengths = np.zeros(len(rows), dtype=np.int64)
    lengths[there] = store.documents["length"][others]
    ids, labels = store.gather(others)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    desirable = pyarrow.array(store.rows["desirable"][rows].astype(np.int32))
    return {
        "rejected_input_ids": _lists(ids, borders),
        "rejected_labels": _lists(labels, borders),
        "desirable": desirable,
    }


def _rejected(store: Store) -> dict[int, int]:
    numbers = np.flatnonzero(store.documents["role"] == REJECTED)
    return dict(zip(store.documents["row"][numbers].tolist(), numbers.tolist(), strict=True))


def heldout(folder: Path, store: Store, documents: np.ndarray, *, preference: bool, fingerprint: str) -> None:
    """The same columns, never packed, with what serving would send and the answer it should get."""
    fields = {
        "input_ids": LIST,
        "labels": LIST,
        "seq_lengths": LIST,
        "rows": LIST,
        "prompt_ids": LIST,
        "reference": "string",
        "row": "int32",
    }
    if store.tests:
        fields["tests"] = "string"
    if preference:
        fields |= OTHER_FIELDS
    _write(
        folder, fields, _heldout_batches(store, documents, preference=preference), fingerprint=f"{fingerprint}-heldout"
    )


def _heldout_batches(store: Store, documents: np.ndarray, *, preference: bool) -> Iterator[dict[str, Any]]:
    rejected = _rejected(store) if preference else {}
    for first in range(0, len(documents), ROWS_AT_ONCE):
        some = documents[first : first + ROWS_AT_ONCE]
        ids, labels = store.gather(some)
        lengths, answers = store.documents["length"][some], store.documents["answer"][some]
        tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        ones = np.arange(len(some) + 1)
        prompts = [ids[start : start + answer] for start, answer in zip(tokens[:-1], answers, strict=True)]
        rows = store.documents["row"][some]
        columns = {
            "input_ids": _lists(ids, tokens),
            "labels": _lists(labels, tokens),
            "seq_lengths": _lists(lengths, ones),
            "rows": _lists(rows, ones),
            "prompt_ids": _lists(np.concatenate(prompts), np.concatenate([[0], np.cumsum(answers, dtype=np.int64)])),
            "reference": pyarrow.array([store.references[int(row)] for row in rows], pyarrow.string()),
            "row": pyarrow.array(rows.astype(np.int32)),
        }
        if store.tests:
            columns["tests"] = pyarrow.array([store.tests.get(int(row)) for row in rows], pyarrow.string())
        if preference:
            columns |= _others(store, rejected, rows)
        yield columns


def _lists(values: np.ndarray, borders: np.ndarray) -> pyarrow.ListArray:
    flat = pyarrow.array(np.ascontiguousarray(values, dtype=np.int32))
    return pyarrow.ListArray.from_arrays(pyarrow.array(np.ascontiguousarray(borders, dtype=np.int32)), flat)


def _write(folder: Path, fields: dict[str, str], batches: Iterator[dict[str, Any]], *, fingerprint: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"string": pyarrow.string(), "int32": pyarrow.int32(), LIST: pyarrow.list_(pyarrow.int32())}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in fields.items()])
    name = "data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for columns in batches:
            writer.write_batch(pyarrow.record_batch(list(columns.values()), schema=schema))
    features = {column: _feature(kind) for column, kind in fields.items()}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}, indent=2))
    # ``datasets`` names the results of its own caches by this, so it must differ where the content does.
    state: dict[str, Any] = {
        "_data_files": [{"filename": name}],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
    }
    (folder / "state.json").write_text(json.dumps(state | {"_output_all_columns": False, "_split": None}, indent=2))


def _feature(kind: str) -> dict[str, Any]:
    if kind == LIST:
        return {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}
    return {"dtype": kind, "_type": "Value"}
