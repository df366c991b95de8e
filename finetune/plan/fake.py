"""Builds the real modelling code on tensors without contents: transformers' class, bitsandbytes' layers, peft's
adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.errors import ModelError
from finetune.kernels import attention as fused_attention
from finetune.kernels import plain
from finetune.plan.inputs import PlanInputs
from finetune.plan.model_config import transformers_config

if TYPE_CHECKING:
    from finetune.config import RunConfig


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive.

    Attributes:
        live: Bytes alive now.
        peak: Bytes at the worst moment since it was last set.
    """

    def __init__(self, resident: list[Tensor], *, size: Any) -> None:
        super().__init__()
        self.live, self.peak, self.size = 0.0, 0.0, size
        self.known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in resident}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = self.size(storage.nbytes())
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: Any) -> None:
            self.live -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, freed)


class FakeBorders:
    """The documents' boundaries, the only values that fused attention reads."""

    def __init__(self, *, documents: int, tokens: int) -> None:
        self.borders = [tokens * number for number in range(documents + 1)]

    def diff(self) -> FakeBorders:
        """Returns the documents' lengths."""
        lengths = FakeBorders(documents=0, tokens=0)
        lengths.borders = [end - start for start, end in pairwise(self.borders)]
        return lengths

    def tolist(self) -> list[int]:
        """Returns the values."""
        return self.borders

    def to(self, _: Any) -> Tensor:
        """Returns a tensor of their shape."""
        return torch.empty(len(self.borders), dtype=torch.int64)


class FakeNativeKernels:
    """Stands in for the compiled kernels of finetune/kernels: writes their shapes, without float32 copies."""

    @staticmethod
    def rms_forward(x: Tensor, weight: Tensor, eps: float, form: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)

    @staticmethod
    def rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: Any) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def gated_forward(both: Tensor, form: Any) -> Tensor:
        return both.new_empty((len(both), both.shape[1] // 2))

    @staticmethod
    def gated_backward(dy: Tensor, both: Tensor, form: Any) -> Tensor:
        return torch.empty_like(both)

    @staticmethod
    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.new_empty(len(logits), dtype=torch.float32)

    @staticmethod
    def attention_forward(
        joint: Tensor, cosine: Tensor, sine: Tensor, borders: Tensor, shape: Any
    ) -> tuple[Tensor, Tensor]:
        tokens = len(joint)
        return joint.new_empty((tokens, shape.sizes[0])), joint.new_empty((tokens, shape.heads), dtype=torch.float32)

    @staticmethod
    def attention_backward(joint: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(joint)


class _Frozen(torch.autograd.Function):
    """Allocates and keeps what bitsandbytes' products do: the weight is dequantized each way; LLM.int8 keeps its input.

    Source: bitsandbytes 0.50, autograd/_functions.py, ``MatMul4Bit`` and ``MatMul8bitLt``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keeps_input: bool) -> Tensor:
        if not keeps_input:
            weight.to(x.dtype)
        ctx.weight, ctx.shape, ctx.kept = weight, x.shape, x if keeps_input else None
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.weight.to(grad.dtype)
        return grad.new_empty(ctx.shape), None, None


class FusedDropout(nn.Module):
    """Dropout as on a GPU: one kernel that keeps a byte per element. On a CPU the mask has the input's dtype."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.probability, True)[0]


def build_model(config: RunConfig, inputs: PlanInputs, *, dtype: str) -> tuple[Any, list[str]]:
    """Builds the adapted model on the meta device as a run does; returns it with the names of its quantized layers.

    Raises:
        ModelError: The quantization method, the family or the variant of LoRA cannot be counted.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    from finetune import lora
    from finetune.quantization import loader_arguments, quantized_layers
    from finetune.quantization.experts import split_experts

    if config.quantization.method not in ("none", "nf4", "fp4", "int8"):
        raise ModelError(
            f"plan --exact: quantization.method={config.quantization.method} is planned in closed form only; "
            "leave --exact out"
        )
    if config.lora.variant == "dora":
        raise ModelError(
            "plan --exact: dora is initialised with the norms of the weights' rows, and a count has no weights; "
            "leave --exact out"
        )
    bnb_config = loader_arguments(config.quantization, dtype=dtype).get("quantization_config")
    model_config = transformers_config(config, inputs.architecture)
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=getattr(torch, dtype), attn_implementation=_attention(inputs)
        )
        if bnb_config is not None:
            skip = bnb_config.llm_int8_skip_modules
            if inputs.packed_4bit and split_experts(model):
                spread_tokens(model)
            replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=bnb_config)
            model.is_loaded_in_4bit, model.is_loaded_in_8bit = inputs.packed_4bit, config.quantization.method == "int8"
        model.requires_grad_(False)
        lora_config = dataclasses.replace(
            config.lora, rank=config.lora.width, variant="lora"
        )  # the initialisation changes no size
        adapted = lora.attach(model, lora_config, upcast=inputs.upcast, checkpointing=inputs.checkpointing, seed=0)
        lora.cast_adapter(adapted, config.lora.dtype)
    return adapted.train(), list(quantized_layers(adapted))


def _attention(inputs: PlanInputs) -> str:
    return "eager" if inputs.attention == "eager" else "sdpa"


def materialize(model: Any, quantized: list[str]) -> None:
    """Gives every parameter and buffer of a meta model a fake storage on the CPU, tied ones once.

    Quantized weights become float32 without contents, so that casting them to 16 bit creates a copy, as dequantizing
    does.
    """
    parameters: dict[int, nn.Parameter] = {}
    frozen = {id(model.get_submodule(name)) for name in quantized}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in parameters:
                quantized_weight = id(module) in frozen and name == "weight"
                shape = (module.out_features, module.in_features) if quantized_weight else parameter.shape
                dtype = torch.float32 if quantized_weight else parameter.dtype
                tensor = torch.empty(shape, dtype=dtype)
                parameters[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module._parameters[name] = parameters[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def replace_quantized_layers(model: Any, quantized: list[str], *, dtype: torch.dtype, keeps_input: bool) -> None:
    """Replaces bitsandbytes' kernels, which need contents, by operations with the same shapes."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        y: Tensor = _Frozen.apply(x.to(dtype), layer.weight, keeps_input)
        return (y if layer.bias is None else y + layer.bias.to(dtype)).to(x.dtype)

    for name in quantized:
        layer = model.get_submodule(name)
        layer.forward = partial(forward, layer)


def spread_tokens(model: Any) -> None:
    """Gives every expert the same number of tokens, since the router's choice has no contents here."""
    from finetune.quantization.experts import split_modules

    def counts(experts: Any, top_k_index: Tensor) -> list[int]:
        each, rest = divmod(top_k_index.numel(), experts.experts)
        return [each + (number < rest) for number in range(experts.experts)]

    for experts in split_modules(model).values():
        experts.counts = partial(counts, experts)  # type: ignore[method-assign]


def use_gpu_dropout(model: Any) -> None:
    """Replaces the CPU's dropout by a GPU's."""
    dropouts = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    for name in dropouts:
        model.set_submodule(name, FusedDropout(model.get_submodule(name).p))


@contextlib.contextmanager
def fused_layers(model: Any, inputs: PlanInputs, *, dtype: torch.dtype) -> Iterator[Any]:
    """Fuses layers where the plan does, within the context; yields the kernels that compute the loss."""
    from finetune.kernels.fusion import Fusion, checkpoint_mlps, fuse
    from finetune.kernels.linear import FusedLinears

    kernels: Any = FakeNativeKernels if inputs.kernels.native else plain
    causal, choice = model.get_base_model(), cast(Any, inputs.kernels)
    before = fused_attention.native
    fused_attention.native = FakeNativeKernels  # type: ignore[assignment]
    try:
        if inputs.kernels.fused:
            cache = inputs.kernels.cached or inputs.method == "none"
            fuse(causal, Fusion(choice, kernels), fuse_linears=partial(FusedLinears.of, cache=cache, dtype=dtype))
        if inputs.kernels.selective:
            checkpoint_mlps(causal)
        yield kernels
    finally:
        fused_attention.native = before
