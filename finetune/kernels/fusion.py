"""Applies the chosen kernels to an adapted model."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from finetune.console import log
from finetune.errors import HardwareError
from finetune.inference.rows import IGNORED
from finetune.kernels import blocks, compiled, native, plain
from finetune.kernels.attention import Documents
from finetune.kernels.autograd import FusedLinearCrossEntropy, TokenLosses
from finetune.kernels.choose import KernelChoice, KernelFacts, choose
from finetune.kernels.documents import attending_by, documents_obstacle, use_documents, varlen_obstacle
from finetune.kernels.forms import ACTIVATIONS, ATTENTIONS, GATED_MLPS, NORMS, head_form
from finetune.kernels.linear import FusedLinears, base_layer, is_adapted
from finetune.memory import free_bytes
from finetune.quantization.backends import backend_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finetune.hardware import Placement
    from finetune.kernels.config import KernelsConfig

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt. Source: malloc.h."""

KEEP_BYTES = 2**31 - 1
LARGEST_KEPT_BYTES = 2**26
"""Larger tensors go back to the system when they are freed: in the heap, the dense matrices of a 7B's layers would
leave holes between the gradients that stay."""
IMPLEMENTATIONS = {"native": native, "compiled": compiled, "plain": plain}
FLOAT16_OBSTACLE = "float16 needs loss scaling, which is done around plain layers only"


@dataclass(slots=True)
class Fusion:
    """The kernels of one model.

    Attributes:
        choice: What was chosen, with reasons.
        kernels: The module that computes norm, gated activation and cross entropy, of `IMPLEMENTATIONS`.
        enabled: Whether fused layers are used; the original forward passes otherwise.
    """

    choice: KernelChoice
    kernels: ModuleType
    enabled: bool = True

    @property
    def autocast(self) -> bool:
        """Returns whether the model needs autocast: fused layers choose their dtypes themselves."""
        return not (self.enabled and self.choice.fused and self.choice.loss_on_trained_tokens)

    @property
    def loss_on_trained_tokens(self) -> bool:
        """Returns whether `loss` is to be used."""
        return self.enabled and self.choice.loss_on_trained_tokens

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Computes everything as transformers and peft do while the context is open."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def loss(self, model: PeftModel, inputs: dict[str, Any]) -> Tensor:
        """Computes the summed loss of the trained tokens in nats, without logits of the other tokens.

        Args:
            model: The adapted model.
            inputs: A micro-batch of the collator, with ``labels``.
        """
        result: Tensor = FusedLinearCrossEntropy.apply(*self._loss_inputs(model, inputs))
        return result

    def token_losses(self, model: PeftModel, inputs: dict[str, Any]) -> Tensor:
        """Computes the loss of each trained token, row by row, shape (tokens,)."""
        result: Tensor = TokenLosses.apply(*self._loss_inputs(model, inputs))
        return result

    def documents(self, inputs: dict[str, Any]) -> Documents | None:
        """Returns the documents of a micro-batch; None where it has rows, or masks are to be used."""
        starts = inputs.get("cu_seq_lens_q")
        if starts is None or not (self.enabled and self.choice.documents):
            return None
        return Documents(starts, inputs["max_length_q"], varlen=self.choice.varlen)

    def _loss_inputs(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, ModuleType, float | None]:
        """Returns the hidden states that predict trained tokens, the head's weight, those tokens, the kernels, and the
        cap of the logits."""
        causal = model.get_base_model()
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with attending_by(self.documents(inputs)):
            hidden = causal.get_decoder()(**rest, use_cache=False).last_hidden_state[:, :-1]
        trained = labels[:, 1:] != IGNORED
        head, form = causal.get_output_embeddings(), head_form(causal.config.get_text_config())
        assert form is not None, "choose() splits no head whose form is unknown"
        predicting = hidden[trained].to(head.weight.dtype)
        if form.factor != 1.0:
            predicting = predicting * form.factor
        return predicting, head.weight, labels[:, 1:][trained], self.kernels, form.softcap


def apply_fusion(
    adapted: Any, config: KernelsConfig, *, placement: Placement, checkpointing: str, fusion_obstacle: str | None = None
) -> Fusion:
    """Fuses what can be fused, in place.

    Args:
        adapted: A `PeftModel` from `lora.attach`, on its device.
        config: The kernels group.
        placement: Device and dtype.
        checkpointing: ``selective`` recomputes the MLPs' activations in backward, fused or not.
        fusion_obstacle: Why layers cannot be fused, whatever the model; None where they may be.

    Raises:
        HardwareError: A setting that this model or machine cannot satisfy.
    """
    model = adapted.get_base_model()
    facts = gather_facts(model, placement, config)
    if fusion_obstacle:
        facts = dataclasses.replace(facts, fusion_obstacle=fusion_obstacle)
    choice = choose(config, facts, device=placement.device)
    log("kernels", *choice.reasons)
    fusion = Fusion(choice, IMPLEMENTATIONS[choice.implementation])
    if choice.fused:
        fuse(model, fusion, fuse_linears=partial(FusedLinears.of, cache=choice.cached, dtype=_dtype(placement.dtype)))
    if choice.documents:
        use_documents(model)
    if checkpointing == "selective":
        checkpoint_mlps(model)
    if choice.tune_malloc:
        tune_malloc()
    return fusion


def fuse(model: Any, fusion: Fusion, *, fuse_linears: blocks.FuseLinears) -> None:
    """Replaces the forward passes of attention, MLPs and norms."""
    for attention in blocks.modules_of(model, ATTENTIONS):
        tiles = fusion.choice.tiles and attention.head_dim % native.TILE_WIDTH == 0
        blocks.fuse_attention(attention, fusion, fuse_linears=fuse_linears, tiles=tiles)
    for mlp in blocks.modules_of(model, GATED_MLPS):
        blocks.fuse_gated_mlp(mlp, fusion, fuse_linears=fuse_linears)
    for norm in blocks.modules_of(model, NORMS):
        blocks.fuse_norm(norm, fusion)


def checkpoint_mlps(model: Any) -> None:
    """Recomputes the activations of all MLPs in backward.

    Raises:
        HardwareError: The model has no MLP of a known class.
    """
    mlps = blocks.modules_of(model, GATED_MLPS)
    if not mlps:
        raise HardwareError(
            f"train.checkpointing=selective knows no gated MLP in {type(model).__name__}; use full or none"
        )
    for mlp in mlps:
        blocks.checkpoint_mlp(mlp)


def gather_facts(model: PreTrainedModel, placement: Placement, config: KernelsConfig) -> KernelFacts:
    """Collects what the choice depends on from the model and the machine; compiles nothing that is not asked for."""
    compiles = config.implementation == "compiled" or (config.implementation == "auto" and placement.device != "cpu")
    linear = _linear_layers(model)
    native_obstacle = _native_obstacle(placement)
    return KernelFacts(
        fusion_obstacle=fusion_obstacle(model, placement.dtype),
        quantized=any(backend_of(base_layer(layer)) is not None for layer in linear),
        dense_bytes=_dtype(placement.dtype).itemsize * sum(layer.in_features * layer.out_features for layer in linear),
        free_bytes=free_bytes(placement.device),
        head_split_obstacle=_head_split_obstacle(model, placement.dtype),
        native_obstacle=native_obstacle,
        tiles=native_obstacle is None and native.has_tiles(),
        compiled_obstacle=compiled.obstacle(placement.device) if compiles else None,
        allocator_obstacle=None if sys.platform == "linux" else "only glibc on Linux can keep it",
        documents_obstacle=documents_obstacle(model),
        varlen_obstacle=varlen_obstacle(
            device=placement.device,
            capability=torch.cuda.get_device_capability() if placement.device == "cuda" else None,
            dtype=placement.dtype,
            widths={int(cast(Any, module).head_dim) for module in model.modules() if hasattr(module, "head_dim")},
        ),
    )


def _native_obstacle(placement: Placement) -> str | None:
    if placement.device != "cpu":
        return f"they are for a CPU and this run is on {placement.device}"
    if placement.dtype != "bfloat16":
        return f"they compute in bfloat16 and this run in {placement.dtype}"
    return native.obstacle()


def fusion_obstacle(model: Any, dtype: str) -> str | None:
    """Returns why this model's layers cannot be fused; None where they can."""
    if dtype == "float16":
        return FLOAT16_OBSTACLE
    attentions, mlps = blocks.modules_of(model, ATTENTIONS), blocks.modules_of(model, GATED_MLPS)
    if not attentions or not mlps:
        return f"{type(model).__name__} has no attention or gated MLP of a known class"
    if any(type(blocks.activation_of(mlp)).__name__ not in ACTIVATIONS for mlp in mlps):
        return "its activation is neither SiLU nor the tanh form of GELU"
    if not all(attention.is_causal for attention in attentions):
        return "its tokens see those after them"
    if any(attention.attention_dropout for attention in attentions):
        return "it has attention dropout"
    linear = _linear_layers(model)
    if reason := _adapter_obstacle([layer for layer in linear if is_adapted(layer)]):
        return reason
    unknown = sorted({_class_name(base_layer(layer)) for layer in linear} - {"Parameter", "Linear4bit", "PackedLinear"})
    if unknown:
        return f"{', '.join(unknown)} layers have their own kernels"
    norms = blocks.modules_of(model, NORMS)
    if any(parameter.dtype != _dtype(dtype) for norm in norms for parameter in norm.parameters()):
        return f"model.upcast keeps norms in another dtype than {dtype}"
    return None


def _adapter_obstacle(layers: list[Any]) -> str | None:
    if any(getattr(layer, "lora_variant", None) for layer in layers):
        return "only peft computes this variant of LoRA"
    return None


def _class_name(layer: Any) -> str:
    """Returns the layer's class, or its weight's where the layer is torch's own."""
    return type(layer.weight).__name__ if type(layer) is torch.nn.Linear else type(layer).__name__


def _linear_layers(model: Any) -> list[Any]:
    """Returns the linear layers of attention and MLPs, adapted or not."""
    fused = blocks.modules_of(model, (*ATTENTIONS, *GATED_MLPS))
    return [layer for module in fused for layer in module.children() if hasattr(layer, "in_features")]


def _head_split_obstacle(model: Any, dtype: str) -> str | None:
    if dtype == "float16":
        return FLOAT16_OBSTACLE
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    is_linear = head is not None and not is_adapted(head) and type(head).__name__ == "Linear"
    if not is_linear or head.bias is not None or head.weight.requires_grad:
        return "its head is not a frozen linear layer without bias"
    if head.weight.dtype != _dtype(dtype):
        return f"its head is not in {dtype}"
    if head_form(text) is None:
        return "it changes its logits after the head"
    if getattr(text, "output_router_logits", False):
        return "its experts add to the loss"
    if any(".modules_to_save." in name for name, _ in model.named_parameters()):
        return "its routers are trained, with a loss of their own"
    return None


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def tune_malloc() -> None:
    """Tells glibc to keep freed memory: requesting a gigabyte of zeroed pages in each step takes a tenth of its
    time."""
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:  # not glibc
        return
    for name, value in ((MMAP_THRESHOLD, LARGEST_KEPT_BYTES), (TRIM_THRESHOLD, KEEP_BYTES), (TOP_PAD, 2**26)):
        library.mallopt(name, value)
