"""bitsandbytes: 4-bit (NF4, FP4) and LLM.int8."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

HEADS = ("lm_head",)


def loader_arguments(config: QuantizationConfig, *, dtype: str) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained``, empty where nothing is quantized.

    Args:
        config: The quantization group.
        dtype: The computation's numbers, e.g. ``bfloat16``.
    """
    prepare()
    if config.method == "none":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if config.method == "int8":
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_threshold=config.threshold, llm_int8_skip_modules=[*HEADS, *config.skip]
            )
        }
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.method,
            bnb_4bit_use_double_quant=config.double,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=[*HEADS, *config.skip],
        )
    }


def protect(model: nn.Module) -> int:
    """Keeps 4-bit weights as they are through evaluation; returns how many layers that concerned.

    On a CPU with AVX512-BF16, bitsandbytes 0.50.2 repacks a layer's weight in place at its first evaluation. The
    packed kernel has no backward pass, so training goes on with gradients cut off and no error, and saving or
    dequantizing gives noise. Whatever is trained, saved or merged must pass through here first.

    Raises:
        ModelError: The layers would be read as noise anyway.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if hasattr(layer, "support_avx512bf16_for_cpu")}
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
    _refuse_misread(layers)
    return len(layers)


def _refuse_misread(layers: dict[str, Any]) -> None:
    """On a CPU, bitsandbytes 0.50.2 reads rows that are no multiple of a block as noise: each row starts a new constant there.

    Raises:
        ModelError: The model has such layers.
    """
    states = {name: layer.weight.quant_state for name, layer in layers.items() if layer.weight.device.type == "cpu"}
    misread = sorted({name.rpartition(".")[2] for name, state in states.items() if state.shape[-1] % state.blocksize})
    if misread:
        raise ModelError(
            f"quantization: on a CPU bitsandbytes reads a 4-bit layer as noise when its inputs are no multiple of 64, as in "
            f"{', '.join(misread)}; keep these unquantized with quantization.skip=[{','.join(misread)}], or use quantization=int8 or none"
        )


def _uncompiled(function: Any, **_: Any) -> Any:
    return function


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The model's bitsandbytes layers by name."""
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dense(layer: Any, dtype: torch.dtype) -> Tensor:
    """A 4-bit or unquantized layer's weight as its own forward pass would see it, shape (outputs, inputs)."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        result: Tensor = layer.weight.data.to(dtype)
        return result
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state).to(dtype)


def prepare() -> None:
    """To be called before transformers imports bitsandbytes: saves a second, and quiets two harmless messages.

    At its import, bitsandbytes 0.50.2 hands two functions of its reserve backend to torch.compile, which imports torch's
    whole compiler. They are left as they are: only devices without a kernel of their own ever call them. The messages
    are of a hub kernel that is not there, and int8's note for each layer and pass.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch

    compiler, torch.compile = torch.compile, _uncompiled  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler
    import warnings

    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
