"""bitsandbytes: 4-bit (NF4, FP4) and LLM.int8."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.quantization.config import PackedWeight, QuantizationConfig
from finetune.quantization.skip_modules import skip_patterns

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def loader_arguments(config: QuantizationConfig, *, dtype: str) -> dict[str, Any]:
    """Returns keyword arguments for ``from_pretrained``."""
    quiet_imports()
    import torch
    from transformers import BitsAndBytesConfig

    skipped = skip_patterns(config.skip_modules)
    if config.method == "int8":
        settings = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=config.threshold, llm_int8_skip_modules=skipped
        )
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.method,
            bnb_4bit_use_double_quant=config.double,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=skipped,
        )
    return {"quantization_config": settings}


def prevent_repacking(model: nn.Module) -> int:
    """Keeps 4-bit weights unchanged during evaluation; returns the number of layers concerned.

    On a CPU with AVX512-BF16, bitsandbytes 0.50.2 repacks a layer's weight in place at its first evaluation. The
    packed kernel has no backward pass, so training continues with gradients cut off and no error, and saving or
    dequantizing gives noise. Call this before a model is trained, saved or merged.

    Raises:
        ModelError: bitsandbytes would read the layers as noise anyway.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "support_avx512bf16_for_cpu")}
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
    _check_block_alignment(layers)
    return len(layers)


def _check_block_alignment(layers: dict[str, Any]) -> None:
    """Checks that rows are multiples of a block on a CPU.

    bitsandbytes 0.50.2 starts a new constant at each row there, and reads other rows as noise.

    Raises:
        ModelError: They are not.
    """
    states = {name: layer.weight.quant_state for name, layer in layers.items() if layer.weight.device.type == "cpu"}
    misread = sorted({name.rpartition(".")[2] for name, state in states.items() if state.shape[-1] % state.blocksize})
    if misread:
        raise ModelError(
            "quantization: on a CPU bitsandbytes reads a 4-bit layer as noise when its inputs are not a multiple of "
            f"64, as in {', '.join(misread)}; leave these unquantized with "
            f"quantization.skip_modules=[{','.join(misread)}], or use quantization=int8 or none"
        )


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return function or (lambda decorated: decorated)


def dense(layer: Any) -> Tensor:
    """Returns the weight, shape (outputs, inputs), in the dtype of its products; float32 for int8.

    Source: bitsandbytes 0.50.2, autograd/_functions.py (MatMul4Bit) and functional.int8_vectorwise_dequant.
    """
    from bitsandbytes import functional

    packed = packed_weight(layer)
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        int8: Tensor = functional.int8_vectorwise_dequant(packed.codes, packed.constants["scales"])
        return int8.float()
    four_bit: Tensor = functional.dequantize_4bit(packed.codes, state).reshape(packed.shape)
    return four_bit.to(layer.compute_dtype or four_bit.dtype)


def packed_weight(layer: Any) -> PackedWeight:
    """Returns the layer's codes and constants."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:  # after its first pass a layer's state has the scales
        codes = weight.CB if weight.CB is not None else weight.data
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return PackedWeight(shape=codes.shape, codes=codes, constants={"scales": scales})
    constants, books = {"absmax": state.absmax}, {"code": state.code}
    if state.nested:
        constants["nested_absmax"] = state.state2.absmax
        books |= {"nested_code": state.state2.code, "offset": state.offset}
    layout = f"{state.quant_type},{state.blocksize},{state.dtype},{tuple(state.shape)}"
    return PackedWeight(shape=state.shape, codes=weight.data, constants=constants, books=books, layout=layout)


def layer_of(key: str) -> str:
    """Returns the name of the layer that a saved tensor belongs to."""
    return key.partition(".weight.")[0].removesuffix(".weight").removesuffix(".SCB").removesuffix(".weight_format")


def is_quantized(keys: list[str]) -> bool:
    """Returns whether the saved tensors of a layer are those of a quantized one."""
    return any(key.endswith((".weight.absmax", ".SCB")) for key in keys)


def dense_from(
    parts: dict[str, Tensor], name: str, *, metadata: dict[str, str], config: QuantizationConfig, dtype: torch.dtype
) -> Tensor:
    """Returns what `dense` returns for the layer that these tensors were saved from.

    Args:
        parts: The saved tensors, by the rest of their names.
        name: Of the layer.
        metadata: Of the file.
        config: The quantization group.
        dtype: Of the products.
    """
    from bitsandbytes import functional

    codes = parts.pop("weight")
    if "SCB" in parts:
        int8: Tensor = functional.int8_vectorwise_dequant(codes, parts["SCB"])
        return int8.float()
    state = functional.QuantState.from_dict(parts, device=codes.device)
    four_bit: Tensor = functional.dequantize_4bit(codes, state).reshape(state.shape)
    return four_bit.to(dtype)


def shape_from(parts: dict[str, Tensor]) -> tuple[int, ...]:
    """Returns the shape of the weight of the layer that these tensors were saved from."""
    if "SCB" in parts:
        return tuple(parts["weight"].shape)
    (state,) = (tensor for name, tensor in parts.items() if ".quant_state." in name)
    return tuple(json.loads(bytes(state.tolist()))["shape"])


def quiet_imports() -> None:
    """Imports the libraries before transformers and peft do: saves seconds, and silences some harmless messages.

    At import, bitsandbytes 0.50.2 (its fallback backend) and hqq 0.2.8 (forward passes that it offers for compiling)
    hand functions to torch.compile, which imports torch's whole compiler; peft imports hqq wherever it is installed.
    Those functions stay uncompiled: nothing here calls them. The messages are about a hub kernel that does not exist,
    int8's note for each layer and pass, and torchao's GPU kernels, which a CPU build of torch cannot load."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch

    compiler, torch.compile = torch.compile, _uncompiled  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401

        with contextlib.suppress(ImportError):
            import hqq.core.quantize  # noqa: F401
    finally:
        torch.compile = compiler
    import warnings

    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
