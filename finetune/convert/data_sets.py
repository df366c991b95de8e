"""Translates the data sets of a training file to the data group."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.convert.read import AXOLOTL, TRL, TrainingFile

Found = tuple[str, Any, str]
"""Key, value and source of a setting; or name, value and reason of what is missing."""

AXOLOTL_FORMATS = {
    "alpaca": "alpaca", "sharegpt": "sharegpt", "chat_template": "auto", "completion": "auto", "gpteacher": "alpaca",
    "oasst": "guanaco", "alpaca:phi": "alpaca", "alpaca:chat": "alpaca",
}  # fmt: skip
LLAMA_FACTORY_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "system": "system"},
    "sharegpt": {"messages": "conversations"},
    "messages": {"messages": "messages"},
    "preference": {"chosen": "chosen", "rejected": "rejected", "prompt": "prompt"},
}
FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt)(\.gz)?$")
NAMES = ("datasets", "dataset", "dataset_name", "dataset_train_split", "test_datasets", "val_set_size", "val_size",
         "eval_dataset", "dataset_path", "pretraining_dataset")  # fmt: skip


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set, as ``data.sources`` has it."""

    path: str | None = None
    hub: str | None = None
    split: str | None = None
    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yields the settings that are set."""
        for name in ("path", "hub", "split", "format"):
            if (value := getattr(self, name)) is not None:
                yield name, value
        if self.columns:
            yield "columns", dict(self.columns)


def data_settings(file: TrainingFile, given: dict[str, Any]) -> tuple[list[Found], list[Found], list[str]]:
    """Returns the settings of the data group, what is missing, and the names of the file that were read."""
    missing: list[Found] = []
    sets = list(_data_sets(file, given, missing))
    settings: list[Found] = []
    where = next((name for name in ("datasets", "dataset_name", "dataset", "pretraining_dataset") if name in given), "")
    if len(sets) == 1:
        settings = [(f"data.{name}", value, f"{where}:") for name, value in sets[0].items()]
    elif sets:
        named = {_name(entry, index): dict(entry.items()) for index, entry in enumerate(sets)}
        settings = [("data.sources", named, f"{where}:")]
    settings += _heldout(file, given, missing)
    missing += [(name, given[name], "name the held-out rows with data.heldout_path")
                for name in ("test_datasets", "eval_dataset") if name in given]  # fmt: skip
    return settings, missing, [name for name in NAMES if name in given]


def _name(entry: DataSet, index: int) -> str:
    stem = Path(entry.path or entry.hub or "").stem
    return f"{re.sub(r'[^0-9A-Za-z_]', '_', stem)}_{index}"


def _heldout(file: TrainingFile, given: dict[str, Any], missing: list[Found]) -> Iterator[Found]:
    name = next((name for name in ("val_set_size", "val_size") if name in given), None)
    size = given.get(name or "")
    if name is None or not isinstance(size, int | float):
        return
    if size == 0:
        missing.append((name, size, "merge and scores here need held-out rows; the share stays the default"))
    elif size < 1:
        yield "data.heldout_share", size, f"{name}:"
    else:
        yield "data.heldout_rows", int(size), f"{name}:"


def _data_sets(file: TrainingFile, given: dict[str, Any], missing: list[Found]) -> Iterator[DataSet]:
    if file.tool == AXOLOTL:
        for name in ("datasets", "pretraining_dataset"):
            entries = given.get(name) or []
            for entry in [entries] if isinstance(entries, dict | str) else entries:
                yield _axolotl(entry if isinstance(entry, dict) else {"path": entry}, missing)
    elif file.tool == TRL:
        entries = given.get("datasets") or []
        for entry in [entries] if isinstance(entries, dict) else entries:
            yield DataSet(hub=str(entry["path"]), split=entry.get("split"))
        if "dataset_name" in given:
            yield _at(str(given["dataset_name"]), given.get("dataset_train_split"), "auto", ())
    else:
        names = given.get("dataset") or ""
        for name in names.split(",") if isinstance(names, str) else names:
            yield from _llama_factory(file, str(name).strip(), missing)


def _at(place: str, split: Any, kind: str, columns: Sequence[tuple[str, str]]) -> DataSet:
    if FILE.search(place) or place.startswith((".", "/", "~")):
        return DataSet(path=place, format=kind, columns=tuple(columns))
    return DataSet(hub=place, split=None if split is None else str(split), format=kind, columns=tuple(columns))


def _axolotl(entry: dict[str, Any], missing: list[Found]) -> DataSet:
    kind, columns = "auto", list[tuple[str, str]]()
    form = entry.get("type")
    if isinstance(form, dict):
        kind, columns = "alpaca", [
            (here, str(form[there]))
            for there, here in (("field_instruction", "instruction"), ("field_input", "input"),
                                ("field_output", "output"), ("field_system", "system"))
            if form.get(there)
        ]  # fmt: skip
        missing.append(("datasets.type", form, "the columns are mapped; the chat template writes the prompt"))
    elif form is not None:
        kind = AXOLOTL_FORMATS.get(str(form), AXOLOTL_FORMATS.get(str(form).partition(":")[0], "auto"))
        if str(form).partition(":")[0] not in AXOLOTL_FORMATS:
            missing.append(("datasets.type", form, "the format is detected from the rows instead"))
    split = entry.get("split")
    if split and "[" in str(split):
        missing.append(("datasets.split", split, "slices of a split are not supported; data.limit=<rows> is"))
        split = str(split).partition("[")[0]
    for name in ("name", "shards", "field_messages", "message_property_mappings", "roles", "chat_template"):
        if entry.get(name):
            missing.append((f"datasets.{name}", entry[name], "columns and roles are detected; see data.columns"))
    place = entry.get("data_files") if isinstance(entry.get("data_files"), str) else entry.get("path")
    return _at(str(place), split, kind, columns)


def _llama_factory(file: TrainingFile, name: str, missing: list[Found]) -> Iterator[DataSet]:
    entry = file.data_sets.get(name)
    if entry is None:
        reason = "dataset_info.json was not found or does not have it; set data.path=<file> or data.hub=<name>"
        missing.append((f"dataset {name}", name, reason))
        return
    kind = str(entry.get("formatting", "alpaca"))
    if kind == "sharegpt" and (entry.get("tags") or {}).get("role_tag") == "role":
        kind = "messages"
    if kind == "openai":
        kind = "messages"
    kind = "preference" if entry.get("ranking") else kind
    wanted = LLAMA_FACTORY_COLUMNS.get(kind, {})
    columns = [(wanted[there], here) for there, here in (entry.get("columns") or {}).items()
               if there in wanted and wanted[there] != here]  # fmt: skip
    place = entry.get("hf_hub_url") or str(Path(entry["folder"]) / str(entry.get("file_name")))
    if kind == "preference":
        kind, columns = "auto", []
    yield DataSet(**{"hub" if entry.get("hf_hub_url") else "path": place}, split=entry.get("split"),
                  format=kind, columns=tuple(columns))  # fmt: skip
