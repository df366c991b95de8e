"""Writes a quantized copy of a checkpoint, with one file in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.quantization.checkpoint_format import CONFIG
from finetune.run import write_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"


def rewrite_checkpoint(
    source: Path,
    target: Path,
    replace: Callable[[str, Tensor], dict[str, Tensor]],
    *,
    quantization_config: dict[str, Any],
) -> None:
    """Writes weights and config.json of a quantized copy of a dense checkpoint.

    Args:
        source: Folder of the dense checkpoint.
        target: An existing folder.
        replace: Returns what stands for a tensor, by name; the tensor itself where it stays.
        quantization_config: Becomes part of config.json.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    size = 0
    for path in sorted(source.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                tensors |= replace(name, file.get_tensor(name))
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            target / path.name,
            metadata={"format": "pt"},
        )
        places |= dict.fromkeys(tensors, path.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(places.values())) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    write_json(target / CONFIG, {**config, "quantization_config": quantization_config})
