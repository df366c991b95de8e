"""Writes Arrow files for ``datasets.load_from_disk`` without importing ``datasets``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from finetune.data.pack import Packs
from finetune.data.store import TokenStore
from finetune.data.worker import REJECTED
from finetune.objectives import PREFERENCE, PROMPT, SUPERVISED, UNPAIRED

BATCH_ROWS = 256
LIST = "list"
FIELDS = {"input_ids": LIST, "labels": LIST, "seq_lengths": LIST, "rows": LIST}
PREFERENCE_FIELDS = {"rejected_input_ids": LIST, "rejected_labels": LIST, "desirable": "int32"}
"""Additional fields of pairs; the lists are empty where a row has no rejected answer."""

MORE_FIELDS: dict[str, dict[str, str]] = {
    SUPERVISED: {},
    PREFERENCE: PREFERENCE_FIELDS,
    UNPAIRED: {"desirable": "int32"},
    PROMPT: {},
}
"""Additional fields of each ``data.objective``."""


def write_train(folder: Path, store: TokenStore, packs: Packs, *, objective: str, fingerprint: str) -> None:
    """Writes packed rows: ``FIELDS``, and those of ``data.objective``. Prompts are written as held-out rows are."""
    if objective == PROMPT:
        _write_with_prompts(folder, store, packs.documents, objective=objective, fingerprint=f"{fingerprint}-train")
        return
    fields = FIELDS | MORE_FIELDS[objective]
    _write(folder, fields, _train_batches(store, packs, objective=objective), fingerprint=f"{fingerprint}-train")


def _train_batches(store: TokenStore, packs: Packs, *, objective: str) -> Iterator[dict[str, Any]]:
    for part in store.slices(len(packs), BATCH_ROWS):
        documents, borders = packs.part(part)
        ids, labels = store.tokens_and_labels(documents)
        lengths = store.documents["length"][documents]
        tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[borders]
        rows = store.documents["row"][documents]
        columns = {
            "input_ids": _lists(ids, tokens),
            "labels": _lists(labels, tokens),
            "seq_lengths": _lists(lengths, borders),
            "rows": _lists(rows, borders),
        }
        if objective == PREFERENCE:
            columns |= _preference_columns(store, rows)
        if objective == UNPAIRED:
            columns["desirable"] = _desirable(store, documents)
        yield columns


def _preference_columns(store: TokenStore, rows: np.ndarray) -> dict[str, Any]:
    """Returns the ``PREFERENCE_FIELDS`` of rows."""
    rejected = store.rejected(rows)
    documents = rejected[rejected >= 0]
    lengths = np.zeros(len(rows), dtype=np.int64)
    lengths[rejected >= 0] = store.documents["length"][documents]
    ids, labels = store.tokens_and_labels(documents)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    desirable = pyarrow.array(store.rows["desirable"][rows].astype(np.int32))
    return {
        "rejected_input_ids": _lists(ids, borders),
        "rejected_labels": _lists(labels, borders),
        "desirable": desirable,
    }


def _desirable(store: TokenStore, documents: np.ndarray) -> pyarrow.Array:
    """Returns 1 for desirable answers and 0 for others; of a pair, the rejected answer is not desirable."""
    rejected = store.documents["role"][documents] == REJECTED
    labelled_bad = store.rows["desirable"][store.documents["row"][documents]] == 0
    return pyarrow.array((~rejected & ~labelled_bad).astype(np.int32))


def write_heldout(folder: Path, store: TokenStore, documents: np.ndarray, *, objective: str, fingerprint: str) -> None:
    """Writes held-out rows: never packed, with the prompt as tokens and as a chat, and the expected answer."""
    _write_with_prompts(folder, store, documents, objective=objective, fingerprint=f"{fingerprint}-heldout")


def _write_with_prompts(
    folder: Path, store: TokenStore, documents: np.ndarray, *, objective: str, fingerprint: str
) -> None:
    fields = FIELDS | {"prompt_ids": LIST, "reference": "string", "row": "int32", "chat": "string"}
    if store.has_tests:
        fields["tests"] = "string"
    fields |= MORE_FIELDS[objective]
    batches = _heldout_batches(store, documents, objective=objective)
    _write(folder, fields, batches, fingerprint=fingerprint)


def _heldout_batches(store: TokenStore, documents: np.ndarray, *, objective: str) -> Iterator[dict[str, Any]]:
    for start in range(0, len(documents), BATCH_ROWS):
        batch = documents[start : start + BATCH_ROWS]
        ids, labels = store.tokens_and_labels(batch)
        lengths, answers = store.documents["length"][batch], store.documents["answer"][batch]
        tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        single = np.arange(len(batch) + 1)
        prompts = [ids[first : first + answer] for first, answer in zip(tokens[:-1], answers, strict=True)]
        rows = store.documents["row"][batch]
        references, chats, tests = zip(*(store.answer(row) for row in rows.tolist()), strict=True)
        columns = {
            "input_ids": _lists(ids, tokens),
            "labels": _lists(labels, tokens),
            "seq_lengths": _lists(lengths, single),
            "rows": _lists(rows, single),
            "prompt_ids": _lists(np.concatenate(prompts), np.concatenate([[0], np.cumsum(answers, dtype=np.int64)])),
            "reference": pyarrow.array(references, pyarrow.string()),
            "row": pyarrow.array(rows.astype(np.int32)),
            "chat": pyarrow.array(chats, pyarrow.string()),
        }
        if store.has_tests:
            columns["tests"] = pyarrow.array(tests, pyarrow.string())
        if objective == PREFERENCE:
            columns |= _preference_columns(store, rows)
        if objective == UNPAIRED:
            columns["desirable"] = _desirable(store, batch)
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
    state: dict[str, Any] = {
        "_data_files": [{"filename": name}],
        "_fingerprint": fingerprint,  # ``datasets`` uses it as a cache key, so it must differ where the content does
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def _feature(kind: str) -> dict[str, Any]:
    if kind == LIST:
        return {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}
    return {"dtype": kind, "_type": "Value"}
