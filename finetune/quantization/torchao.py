"""torchao: 8-bit weights with one scale per row; products are computed in 16 bit, so gradients pass."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from finetune.quantization.config import PackedWeight, QuantizationConfig
from finetune.quantization.skip_modules import skip_patterns

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def loader_arguments(config: QuantizationConfig, *, dtype: str) -> dict[str, Any]:
    """Returns keyword arguments for ``from_pretrained``."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    skipped = skip_patterns(config.skip_modules)
    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)}


def dense(layer: Any) -> Tensor:
    """Returns the weight, shape (outputs, inputs), in the dtype that it was quantized from."""
    weight: Tensor = layer.weight.dequantize()
    return weight


def layer_of(key: str) -> str:
    """Returns the name of the layer that a saved tensor belongs to."""
    return key.rpartition(".")[0]


def is_quantized(keys: list[str]) -> bool:
    """Returns whether the saved tensors of a layer are those of a quantized one."""
    return any(key.endswith("._weight_qdata") for key in keys)


def dense_from(
    parts: dict[str, Tensor], name: str, *, metadata: dict[str, str], config: QuantizationConfig, dtype: torch.dtype
) -> Tensor:
    """Returns what `dense` returns for the layer that these tensors were saved from; see `bnb.dense_from`."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    key = f"{name}.weight"
    own = {"tensor_names": json.dumps([key]), key: metadata[key]}
    weights, _ = unflatten_tensor_state_dict({f"{name}.{part}": value for part, value in parts.items()}, own)
    weight: Tensor = weights[key].dequantize()
    return weight


def packed_weight(layer: Any) -> PackedWeight:
    """Returns the layer's codes and constants."""
    weight = layer.weight
    names, attributes = weight.__tensor_flatten__()
    constants = {name: getattr(weight, name) for name in names if name != "qdata"}
    return PackedWeight(shape=weight.shape, codes=weight.qdata, constants=constants, layout=str(attributes))
