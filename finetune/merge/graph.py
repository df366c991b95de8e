"""Adds further adapters to the trained model, and reads the dense weights of its quantized layers, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import MergeError
from finetune.merge.candidates import Source
from finetune.merge.experts import ExpertStack, stacks
from finetune.model.text_only import decoder_name
from finetune.quantization.expert_tensors import expert_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.model import ModelSpec
    from finetune.quantization.stored import StoredLayers

SHARD = "2GB"
"""Bounds the host memory for saving a model that is on a GPU."""


def dequantized(spec: ModelSpec, graph: Any, *, work: Path) -> Source:
    """Returns a source that gives each quantized layer's weight as the trained model multiplies by it.

    The layers are read one at a time from the base's own files where these are quantized, else from the cached copy of
    the quantized base, or from one that is written to ``work`` where there is no cache. So the source does not refer to
    the graph, and needs memory for one dense layer.

    Args:
        spec: The base as it was loaded for training.
        graph: The quantized base with the adapter; without its adapter afterwards where a copy had to be written.
        work: Folder for the copy.
    """
    from finetune.merge.prequantized import packed_base
    from finetune.model.load import cache_of
    from finetune.quantization.backends import save
    from finetune.quantization.stored import StoredLayers

    if packed := packed_base(spec):
        return stored(packed, base=spec.base.folder)
    cache, folder = cache_of(spec), work / "quantized"
    if cache is not None and cache.is_complete:
        folder = cache.folder
    else:
        save(graph.unload(), spec.quantization, folder, shard=SHARD)
    layers = StoredLayers(folder, spec.quantization, dtype=spec.placement.dtype, device=spec.placement.device)
    return stored(layers, base=spec.base.folder)


def stored(layers: StoredLayers, *, base: Path) -> Source:
    """Returns a source of dequantized layers; other tensors come from the base.

    Args:
        layers: Of the quantized base.
        base: Folder of the dense base.
    """
    names = {f"{name}.weight": name for name in layers.keys}
    experts = stacks(layers, base=base)

    def source(name: str) -> Tensor | ExpertStack | None:
        if place := expert_tensor(name):
            return experts(place)
        name = decoder_name(name)
        matching = name if name in names else next((other for other in names if other.endswith("." + name)), None)
        return layers.dense(names[matching]) if matching else None

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

    from finetune.lora.experts import prepare_base_for

    names = ["default"]
    for folder, weight in adapters.items():
        path, name = Path(folder).expanduser(), f"further_{len(names)}"
        record = path / "finetune.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["base"]["sha256"] != base_sha256:
            raise MergeError(
                f"merge.adapters: {folder} says that it was trained on another base (finetune.json); leave it out"
            )
        prepare_base_for(graph, path)
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
