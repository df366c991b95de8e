"""torchao: 8-bit weights with a scale a row; products are computed in 16 bit, so gradients pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.quantization.config import QuantizationConfig
from finetune.quantization.skip_modules import patterns
from finetune.quantization.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor


def loader_arguments(config: QuantizationConfig, *, dtype: str) -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=patterns(config.keep))}


def dense(layer: Any) -> Tensor:
    """The weight, shape (outputs, inputs), in the numbers that it was made from."""
    weight: Tensor = layer.weight.dequantize()
    return weight


def stored(layer: Any) -> Stored:
    weight = layer.weight
    names, facts = weight.__tensor_flatten__()
    constants = {name: getattr(weight, name) for name in names if name != "qdata"}
    return Stored(shape=weight.shape, codes=weight.qdata, constants=constants, facts=str(facts))
