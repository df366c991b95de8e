"""The weights that the adapter was trained on, read out of the quantized model layer by layer."""

from typing import Any

import torch
from torch import Tensor

from finetune.merge.candidates import Source
from finetune.merge.changes import PREFIX


def dequantized(graph: Any) -> Source:
    """Each quantized layer's weight as the trained graph multiplies by it; other tensors come from disk.

    Args:
        graph: The quantized base, with or without the adapter, protected from bitsandbytes' repacking.

    Returns:
        A source for `build`. It holds the graph; only one dense layer exists at a time.
    """
    from finetune.quantization import quantized_layers

    layers = {f"{_plain(name)}.weight": layer for name, layer in quantized_layers(graph).items()}

    def source(name: str) -> Tensor | None:
        matching = name if name in layers else next((other for other in layers if other.endswith("." + name)), None)
        return weight_of(layers[matching]) if matching else None

    return source


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(".base_layer")


def weight_of(layer: Any) -> Tensor:
    """One bitsandbytes layer's dense weight, shape (outputs, inputs), in the numbers that it computes in.

    Source: bitsandbytes 0.50.2, autograd/_functions.py (MatMul4Bit) and functional.int8_vectorwise_dequant.
    """
    import bitsandbytes

    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        weight: Any = layer.weight
        state = weight.quant_state
        dense: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, state)
        return dense.reshape(state.shape).to(layer.compute_dtype or dense.dtype)
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    values = layer.weight.CB if layer.weight.CB is not None else layer.weight.data
    return bitsandbytes.functional.int8_vectorwise_dequant(values, scales).to(torch.float32)
