"""Loads and drops adapters of the served base while the server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import ModelError
from finetune.export.loader import check
from finetune.inference.adapted import add_adapter
from finetune.serve.errors import ApiError
from finetune.serve.graphs import ServedModel
from finetune.serve.transformers_engine import TransformersEngine

SAME = ("base", "model", "quantization", "computation", "tokenizer")
"""Parts of the record in which an adapter must agree with the first one: they decide the graph below it, and how it is
asked."""


class AdapterLoader:
    """Adds adapters that were trained on the same base, with the same settings, template and end tokens.

    Args:
        engine: Serves the base.
        graph: The base with its first adapter.
        record: Of the first adapter.
        root: Adapters come from below this folder.
    """

    def __init__(self, engine: TransformersEngine, graph: Any, record: dict[str, Any], *, root: Path) -> None:
        self._engine, self._graph, self._record, self._root = engine, graph, record, root.resolve()
        self._loaded: dict[str, str] = {}
        self._count = 0

    def load(self, name: str, path: str) -> Path:
        """Loads an adapter under a name; returns its folder.

        Raises:
            ApiError: It is elsewhere, damaged, or belongs to another base.
        """
        wanted = (self._root / path).resolve()
        if not wanted.is_relative_to(self._root):
            raise ApiError(403, f"lora_path: adapters are loaded from below {self._root} only", parameter="lora_path")
        try:
            folder, record = check(wanted)
            self._check_record(folder, record)
            self._engine.call(lambda: self._add(name, folder))
        except ModelError as error:
            raise ApiError(400, f"lora_path: {error}", parameter="lora_path") from error
        return folder

    def unload(self, name: str) -> None:
        """Drops an adapter that was loaded; its answers end.

        Raises:
            ApiError: There is none of this name.
        """
        if name not in self._loaded:
            loaded = ", ".join(sorted(self._loaded)) or "none"
            raise ApiError(404, f"lora_name: {name} was not loaded; loaded: {loaded}", parameter="lora_name")
        self._engine.call(lambda: self._drop(name))

    def _check_record(self, folder: Path, record: dict[str, Any]) -> None:
        if record["kind"] != "adapter":
            raise ModelError(f"{folder} holds a {record['kind']} model, not an adapter")
        other = [part for part in SAME if _comparable(record[part]) != _comparable(self._record[part])]
        if other:
            raise ModelError(
                f"{folder} was trained with another {' and '.join(other)} than the adapter served here; "
                "serve it on a server of its own"
            )

    def _add(self, name: str, folder: Path) -> None:
        self._count += 1
        inner = f"adapter_{self._count}"  # a torch module's name may have no dot
        add_adapter(self._graph, folder, name=inner)
        self._loaded[name] = inner
        self._engine.graphs.add(ServedModel(name=name, graph=self._graph, adapter=inner))

    def _drop(self, name: str) -> None:
        self._engine.remove(name)
        self._graph.delete_adapter(self._loaded.pop(name))


def _comparable(part: dict[str, Any]) -> dict[str, Any]:
    """Returns a part of a record without what differs between machines."""
    return {key: value for key, value in part.items() if key not in ("name", "source", "settings")}
