"""Models by name: graphs in memory, and which adapter of a graph answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.inference.logits import unwrap


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as it is asked for by name.

    Attributes:
        name: What a request calls it.
        graph: A causal language model, with or without peft layers.
        adapter: Name of the peft adapter to activate; None computes without any.
    """

    name: str
    graph: Any
    adapter: str | None


class Graphs:
    """The models, of which each graph computes as one at a time.

    Args:
        models: In the order in which they are listed.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}
        self._active: dict[int, str | None] = {}

    def names(self) -> list[str]:
        """Returns the models' names."""
        return list(self._models)

    def causal(self) -> list[Any]:
        """Returns the causal language model of each graph."""
        return list({id(model.graph): unwrap(model.graph) for model in self._models.values()}.values())

    def activate(self, name: str) -> Any:
        """Makes a graph compute with the model's adapter; returns the causal language model."""
        model = self._models[name]
        key = id(model.graph)
        if hasattr(model.graph, "peft_config") and self._active.get(key, "") != model.adapter:
            if model.adapter is None:
                model.graph.base_model.disable_adapter_layers()
            else:
                model.graph.base_model.enable_adapter_layers()
                model.graph.set_adapter(model.adapter, inference_mode=True)
            self._active[key] = model.adapter
        return unwrap(model.graph)

    def add(self, model: ServedModel) -> None:
        """Adds a model; peft may have changed which adapter is active."""
        self._active.pop(id(model.graph), None)
        self._models[model.name] = model

    def remove(self, name: str) -> None:
        """Removes a model; another adapter of its graph is activated before the next token."""
        self._active.pop(id(self._models.pop(name).graph), None)
