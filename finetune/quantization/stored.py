"""Reads the dense weights of a saved quantized base, one layer at a time and without a model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.hardware.backends import BACKENDS
from finetune.quantization.backends import LIBRARIES
from finetune.quantization.config import PREQUANTIZED, QuantizationConfig
from finetune.quantization.packed_checkpoint import reader

if TYPE_CHECKING:
    from torch import Tensor


class StoredLayers:
    """The quantized layers in a folder that `finetune.quantization.backends.save` wrote, or of a prequantized base.

    Args:
        folder: Holds the safetensors; of a prequantized base, config.json too.
        config: The quantization group that the layers were made with.
        dtype: Of the products, e.g. ``bfloat16``.
        device: Where each layer is dequantized; the result is on it too.
    """

    def __init__(self, folder: Path, config: QuantizationConfig, *, dtype: str, device: str) -> None:
        from safetensors import safe_open

        self.config, self.dtype, self.device = config, dtype, device
        is_base = config.method == PREQUANTIZED
        self.library = reader(folder) if is_base else LIBRARIES[BACKENDS[config.method].library]
        self.metadata: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.metadata |= file.metadata() or {}
                self.files |= dict.fromkeys(file.keys(), path)
        keys: dict[str, list[str]] = defaultdict(list)
        for key in self.files:
            keys[self.library.layer_of(key)].append(key)
        self.keys = {name: parts for name, parts in keys.items() if self.library.is_quantized(parts)}

    @property
    def names(self) -> list[str]:
        """Returns the names of all modules with a weight, quantized or not."""
        return [*self.keys, *(key.removesuffix(".weight") for key in self.files if key.endswith(".weight"))]

    def dense(self, name: str) -> Tensor:
        """Returns the weight of a layer as the loaded model multiplies by it, shape (outputs, inputs).

        Args:
            name: Of the layer, one of ``names``; one that is not in ``keys`` is not quantized.
        """
        import torch

        if name not in self.keys:
            return self._tensor(f"{name}.weight").to(self.device)
        parts = {part: tensor.to(self.device) for part, tensor in self._parts(name).items()}
        dtype = getattr(torch, self.dtype)
        weight: Tensor = self.library.dense_from(parts, name, metadata=self.metadata, config=self.config, dtype=dtype)
        return weight

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the dense weight of a quantized layer of a prequantized base."""
        return tuple(self.library.shape_from(self._parts(name)))

    def _parts(self, name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): self._tensor(key) for key in self.keys[name]}

    def _tensor(self, key: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor
