"""Loads and drops adapters of the served base while the server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from finetune.errors import ModelError
from finetune.export.loader import check
from finetune.inference.adapted import add_adapter
from finetune.serve.errors import ApiError
from finetune.serve.graphs import ServedModel
from finetune.serve.transformers_engine import TransformersEngine

SAME = ("base", "model", "quantization", "computation", "tokenizer")
"""Parts of the record in which an adapter must agree with the first one: they decide the graph below it, and how it is
asked."""


class AdapterHost(Protocol):
    """Adds adapters to the base that an engine serves. Its methods may be called from any thread."""

    def add_adapter(self, name: str, folder: Path) -> None:
        """Loads an adapter under a name.

        Raises:
            ModelError: It does not fit.
        """

    def drop_adapter(self, name: str) -> None:
        """Ends an adapter's answers and drops it."""


class GraphAdapters:
    """Adapters in transformers.

    Args:
        engine: Serves the base.
        graph: The base with its first adapter.
    """

    def __init__(self, engine: TransformersEngine, graph: Any) -> None:
        self._engine, self._graph = engine, graph
        self._inner: dict[str, str] = {}
        self._count = 0

    def add_adapter(self, name: str, folder: Path) -> None:
        """Loads an adapter between two tokens."""
        self._engine.call(lambda: self._add(name, folder))

    def drop_adapter(self, name: str) -> None:
        """Ends an adapter's answers and drops it between two tokens."""
        self._engine.call(lambda: self._drop(name))

    def _add(self, name: str, folder: Path) -> None:
        self._count += 1
        inner = f"adapter_{self._count}"  # a torch module's name may have no dot
        add_adapter(self._graph, folder, name=inner)
        self._inner[name] = inner
        self._engine.graphs.add(ServedModel(name=name, graph=self._graph, adapter=inner))

    def _drop(self, name: str) -> None:
        self._engine.remove(name)
        self._graph.delete_adapter(self._inner.pop(name))


class AdapterLoader:
    """Adds adapters that were trained on the same base, with the same settings, template and end tokens.

    Args:
        host: Serves the base.
        record: Of the first adapter.
        root: Adapters come from below this folder.
    """

    def __init__(self, host: AdapterHost, record: dict[str, Any], *, root: Path) -> None:
        self._host, self._record, self._root = host, record, root.resolve()
        self._loaded: set[str] = set()

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
            self._host.add_adapter(name, folder)
        except ModelError as error:
            raise ApiError(400, f"lora_path: {error}", parameter="lora_path") from error
        self._loaded.add(name)
        return folder

    def unload(self, name: str) -> None:
        """Drops an adapter that was loaded; its answers end.

        Raises:
            ApiError: There is none of this name.
        """
        if name not in self._loaded:
            loaded = ", ".join(sorted(self._loaded)) or "none"
            raise ApiError(404, f"lora_name: {name} was not loaded; loaded: {loaded}", parameter="lora_name")
        self._loaded.remove(name)
        self._host.drop_adapter(name)

    def _check_record(self, folder: Path, record: dict[str, Any]) -> None:
        if record["kind"] != "adapter":
            raise ModelError(f"{folder} holds a {record['kind']} model, not an adapter")
        other = [part for part in SAME if _comparable(record[part]) != _comparable(self._record[part])]
        if other:
            raise ModelError(
                f"{folder} was trained with another {' and '.join(other)} than the adapter served here; "
                "serve it on a server of its own"
            )


def _comparable(part: dict[str, Any]) -> dict[str, Any]:
    """Returns a part of a record without what differs between machines."""
    return {key: value for key, value in part.items() if key not in ("name", "source", "settings")}
