"""Shows the checkpoint of a prequantized base as the dense one that it stands for: what a merge starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.merge.checkpoint import StoredTensor, read_checkpoint

if TYPE_CHECKING:
    import torch

    from finetune.model import ModelSpec
    from finetune.quantization.stored import StoredLayers


def packed_base(spec: ModelSpec) -> StoredLayers | None:
    """Returns the layers that the base's own files hold quantized; None for a dense base."""
    from finetune.quantization.stored import StoredLayers

    if not spec.is_prequantized:
        return None
    placement = spec.placement
    return StoredLayers(spec.base.folder, spec.quantization, dtype=placement.dtype, device=placement.device)


def dense_checkpoint(
    base: Path, layers: StoredLayers | None, *, dtype: torch.dtype
) -> dict[str, list[tuple[str, StoredTensor]]]:
    """Returns what `read_checkpoint` returns, with one dense weight in place of the tensors of each quantized layer.

    Args:
        base: The base's folder.
        layers: Its quantized layers, whose contents a source must give; None for a dense base.
        dtype: Of the dense weights.
    """
    files = read_checkpoint(base)
    if layers is None:
        return files
    seen: set[str] = set()

    def dense(tensors: list[tuple[str, StoredTensor]]) -> Iterator[tuple[str, StoredTensor]]:
        for name, entry in tensors:
            layer = layers.library.layer_of(name)
            if layer not in layers.keys:
                yield name, entry
            elif layer not in seen:
                seen.add(layer)
                yield f"{layer}.weight", dataclasses.replace(entry, dtype=dtype, shape=layers.shape(layer))

    return {file: list(dense(tensors)) for file, tensors in files.items()}


def dense_bytes(base: Path, layers: StoredLayers | None, *, dtype: torch.dtype) -> int:
    """Returns the bytes of a base's weights, dense in a dtype."""
    tensors = [entry for entries in dense_checkpoint(base, layers, dtype=dtype).values() for _, entry in entries]
    return sum(prod(entry.shape) * dtype.itemsize for entry in tensors)
