"""Reads the dense weights of a saved quantized base, one layer at a time and without a model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.hardware.backends import BACKENDS
from finetune.quantization.backends import LIBRARIES
from finetune.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    from torch import Tensor


class StoredLayers:
    """The quantized layers in a folder that `finetune.quantization.backends.save` wrote.

    Args:
        folder: Holds the safetensors.
        config: The quantization group that the layers were made with.
        dtype: Of the products, e.g. ``bfloat16``.
        device: Where each layer is dequantized; the result is on it too.
    """

    def __init__(self, folder: Path, config: QuantizationConfig, *, dtype: str, device: str) -> None:
        from safetensors import safe_open

        self.config, self.dtype, self.device = config, dtype, device
        self.library = LIBRARIES[BACKENDS[config.method].library]
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
        from safetensors import safe_open

        if name not in self.keys:
            key = f"{name}.weight"
            with safe_open(self.files[key], "pt") as file:
                plain: Tensor = file.get_tensor(key)
            return plain.to(self.device)
        parts: dict[str, Any] = {}
        for key in self.keys[name]:
            with safe_open(self.files[key], "pt") as file:
                parts[key.removeprefix(f"{name}.")] = file.get_tensor(key).to(self.device)
        dtype = getattr(torch, self.dtype)
        weight: Tensor = self.library.dense_from(parts, name, metadata=self.metadata, config=self.config, dtype=dtype)
        return weight
