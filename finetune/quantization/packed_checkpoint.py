"""Reads the tensors of a base that is stored quantized: headers, and dense weights layer by layer without a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.quantization import bnb
from finetune.quantization.checkpoint_format import CheckpointFormat, read_format
from finetune.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "I32": "int32",
    "I64": "int64",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
}
"""Of packed tensors, by their names in safetensors."""


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """Place, dtype and shape of a tensor of a checkpoint.

    Attributes:
        file: The safetensors file.
        dtype: As safetensors names it.
        shape: Of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, PackedTensor]:
    """Returns the tensors of a folder's safetensors by name; reads no contents."""
    from safetensors import safe_open

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                view = file.get_slice(key)
                tensors[key] = PackedTensor(file=path, dtype=view.get_dtype(), shape=tuple(view.get_shape()))
    return tensors


def layer_of(key: str) -> str:
    """Returns the name of the layer that a saved tensor belongs to; a bias is a layer of its own."""
    from finetune.quantization.unpack import PARTS

    name, _, part = key.rpartition(".")
    return name if part == "weight" or part in PARTS else key


def is_quantized(keys: list[str]) -> bool:
    """Returns whether the saved tensors of a layer are those of a quantized one."""
    from finetune.quantization.unpack import SCALES

    return any(key.rpartition(".")[2] in SCALES for key in keys)


def packed_names(headers: Mapping[str, PackedTensor]) -> dict[str, dict[str, PackedTensor]]:
    """Returns the tensors of each quantized layer, by the layer's name and the last segment of theirs."""
    layers: dict[str, dict[str, PackedTensor]] = defaultdict(dict)
    for key, tensor in headers.items():
        layers[layer_of(key)][key.rpartition(".")[2]] = tensor
    return {name: parts for name, parts in layers.items() if is_quantized(list(parts))}


class PackedReader:
    """Reads quantized layers from a checkpoint's own files, as `finetune.quantization.stored` asks for them.

    Args:
        stored: How they are stored.
    """

    def __init__(self, stored: CheckpointFormat) -> None:
        self.stored = stored

    def layer_of(self, key: str) -> str:
        """Returns the name of the layer that a saved tensor belongs to."""
        return layer_of(key)

    def is_quantized(self, keys: list[str]) -> bool:
        """Returns whether the saved tensors of a layer are those of a quantized one."""
        return is_quantized(keys)

    def dense_from(
        self,
        parts: dict[str, Tensor],
        name: str,
        *,
        metadata: dict[str, str],
        config: QuantizationConfig,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns the weight that the loaded layer multiplies by; see `bnb.dense_from`."""
        from finetune.quantization.unpack import dense_weight, without_plain_order

        plain = without_plain_order(parts, self.stored)
        return dense_weight(plain, self.stored, shape=self.shape_from(parts), dtype=dtype)

    def shape_from(self, parts: dict[str, Tensor]) -> tuple[int, int]:
        """Returns the shape of the weight, (outputs, inputs)."""
        from finetune.quantization.unpack import weight_shape

        return weight_shape({part: tuple(tensor.shape) for part, tensor in parts.items()}, self.stored)


def reader(folder: Path) -> Any:
    """Returns what reads the quantized layers of a base's own files: a `PackedReader`, or bitsandbytes' module.

    Raises:
        ModelError: The base is not quantized, or in a way that cannot be read.
    """
    stored = required_format(folder)
    return bnb if stored.packing == "bitsandbytes" else PackedReader(stored)


def required_format(folder: Path) -> CheckpointFormat:
    """Returns how a base is stored.

    Raises:
        ModelError: It is dense, or quantized in a way that cannot be read.
    """
    stored = read_format(folder)
    if stored is None:
        raise ModelError(
            f"quantization=prequantized: {folder / 'config.json'} has no quantization_config, so its weights are "
            "dense; choose quantization=nf4_double"
        )
    return stored
