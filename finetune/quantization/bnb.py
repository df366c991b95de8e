"""bitsandbytes: 4-bit (NF4, FP4) and LLM.int8."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.quantization.config import QuantizationConfig
from finetune.quantization.skip_modules import patterns
from finetune.quantization.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor, nn


def loader_arguments(config: QuantizationConfig, *, dtype: str) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained``."""
    prepare()
    import torch
    from transformers import BitsAndBytesConfig

    kept = patterns(config.keep)
    if config.method == "int8":
        settings = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=config.threshold, llm_int8_skip_modules=kept
        )
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.method,
            bnb_4bit_use_double_quant=config.double,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=kept,
        )
    return {"quantization_config": settings}


def protect(model: nn.Module) -> int:
    """Keeps 4-bit weights as they are through evaluation; returns how many layers that concerned.

    On a CPU with AVX512-BF16, bitsandbytes 0.50.2 repacks a layer's weight in place at its first evaluation. The
    packed kernel has no backward pass, so training goes on with gradients cut off and no error, and saving or
    dequantizing gives noise. Whatever is trained, saved or merged must pass through here first.

    Raises:
        ModelError: The layers would be read as noise anyway.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "support_avx512bf16_for_cpu")}
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
            f"{', '.join(misread)}; keep these unquantized with quantization.keep=[{','.join(misread)}], or use quantization=int8 or none"
        )


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return function or (lambda decorated: decorated)


def dense(layer: Any) -> Tensor:
    """The weight, shape (outputs, inputs), in the numbers that it multiplies in; float32 for int8.

    Source: bitsandbytes 0.50.2, autograd/_functions.py (MatMul4Bit) and functional.int8_vectorwise_dequant.
    """
    from bitsandbytes import functional

    found = stored(layer)
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        eight: Tensor = functional.int8_vectorwise_dequant(found.codes, found.constants["scales"])
        return eight.float()
    four: Tensor = functional.dequantize_4bit(found.codes, state).reshape(found.shape)
    return four.to(layer.compute_dtype or four.dtype)


def stored(layer: Any) -> Stored:
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:  # after its first pass a layer's state has the scales
        codes = weight.CB if weight.CB is not None else weight.data
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return Stored(shape=codes.shape, codes=codes, constants={"scales": scales})
    constants, books = {"absmax": state.absmax}, {"code": state.code}
    if state.nested:
        constants["nested_absmax"] = state.state2.absmax
        books |= {"nested_code": state.state2.code, "offset": state.offset}
    facts = f"{state.quant_type},{state.blocksize},{state.dtype},{tuple(state.shape)}"
    return Stored(shape=state.shape, codes=weight.data, constants=constants, books=books, facts=facts)


def prepare() -> None:
    """To be called before transformers and peft import the libraries: saves seconds, and quiets some harmless messages.

    At their import, bitsandbytes 0.50.2 (its reserve backend) and hqq 0.2.8 (forward passes that it offers for compiling)
    hand functions to torch.compile, which imports torch's whole compiler; peft imports hqq wherever it is installed. They
    are left as they are: nothing here calls them. The messages are of a hub kernel that is not there, int8's note for each
    layer and pass, and torchao's GPU kernels, which a build of torch for CPUs cannot load.
    """
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
