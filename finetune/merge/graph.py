"""Adds further adapters to the trained model, and reads the dense weights of its quantized layers, one at a time."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.errors import MergeError
from finetune.merge.adapter_deltas import PREFIX
from finetune.merge.candidates import Source


def dequantized(graph: Any) -> Source:
    """Returns a source that gives each quantized layer's weight as the trained model multiplies by it.

    Args:
        graph: The quantized base, with or without the adapter, protected from bitsandbytes' repacking.

    Returns:
        A source for `build`; other tensors come from disk. It refers to the graph; one dense layer exists at a time.
    """
    from finetune.quantization import quantized_layers
    from finetune.quantization.backends import dense

    layers = {f"{_plain(name)}.weight": layer for name, layer in quantized_layers(graph).items()}

    def source(name: str) -> Tensor | None:
        matching = name if name in layers else next((other for other in layers if other.endswith("." + name)), None)
        return dense(layers[matching]) if matching else None

    return source


def add_adapters(graph: Any, adapters: dict[str, float], *, base_sha256: str) -> None:
    """Loads further adapters next to the run's, each with its weight and in the dtype in which it was saved.

    Args:
        graph: The trained model.
        adapters: Weight by folder.
        base_sha256: Of the run's base; an adapter whose finetune.json names another base is refused.

    Raises:
        MergeError: An adapter is for another base.
    """
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    names = ["default"]
    for folder, weight in adapters.items():
        path, name = Path(folder).expanduser(), f"further_{len(names)}"
        record = path / "finetune.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["base"]["sha256"] != base_sha256:
            raise MergeError(
                f"merge.adapters: {folder} says that it was trained on another base (finetune.json); leave it out"
            )
        try:
            graph.load_adapter(str(path), adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise MergeError(
                f"merge.adapters: {folder} does not fit this base: {str(error).splitlines()[0]}"
            ) from error
        saved = load_file(path / "adapter_model.safetensors")
        for key, parameter in graph.named_parameters():
            if f".{name}" in key:
                parameter.data = saved[key.replace(f".{name}", "")].to(parameter.device)
        for module in graph.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
        names.append(name)
    graph.base_model.set_adapter(names, inference_mode=True)
    graph.requires_grad_(False)


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(".base_layer")
