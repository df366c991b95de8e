"""The trained graph: further adapters on it, and the weights under it, read out of the quantized model layer by layer."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.errors import MergeError
from finetune.merge.adapter_deltas import PREFIX
from finetune.merge.candidates import Source


def dequantized(graph: Any) -> Source:
    """Each quantized layer's weight as the trained graph multiplies by it; other tensors come from disk.

    Args:
        graph: The quantized base, with or without the adapter, protected from bitsandbytes' repacking.

    Returns:
        A source for `build`. It holds the graph; only one dense layer exists at a time.
    """
    from finetune.quantization import quantized_layers
    from finetune.quantization.backends import dense

    layers = {f"{_plain(name)}.weight": layer for name, layer in quantized_layers(graph).items()}

    def source(name: str) -> Tensor | None:
        matching = name if name in layers else next((other for other in layers if other.endswith("." + name)), None)
        return dense(layers[matching]) if matching else None

    return source


def add_adapters(graph: Any, adapters: dict[str, float], *, base_sha256: str) -> None:
    """Puts further adapters beside the run's own, each with its weight, in the numbers that they were saved in.

    Args:
        graph: The trained graph.
        adapters: Weight by folder.
        base_sha256: Of the run's base; an adapter that says it was trained on another one is refused.

    Raises:
        MergeError: An adapter is for another base.
    """
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    names = ["default"]
    for folder, weight in adapters.items():
        place, name = Path(folder).expanduser(), f"further_{len(names)}"
        record = place / "finetune.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["base"]["sha256"] != base_sha256:
            raise MergeError(
                f"merge.adapters: {folder} says that it was trained on another base (finetune.json); leave it out"
            )
        try:
            graph.load_adapter(str(place), adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise MergeError(
                f"merge.adapters: {folder} does not fit this base: {str(error).splitlines()[0]}"
            ) from error
        saved = load_file(place / "adapter_model.safetensors")
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
