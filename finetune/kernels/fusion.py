"""The verb: changes how an adapted model computes its steps, and says what was chosen."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.console import log
from finetune.errors import HardwareError
from finetune.inference.rows import IGNORED
from finetune.kernels import blocks, native, plain
from finetune.kernels.autograd import FusedLinearCrossEntropy, TokenLosses
from finetune.kernels.blocks import Switch
from finetune.kernels.choose import Choice, Facts, choose
from finetune.kernels.linear import FusedLinears, base, is_adapted
from finetune.quantization import library_of

if TYPE_CHECKING:
    from finetune.hardware import Placement
    from finetune.kernels.config import KernelsConfig

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Names of glibc's mallopt. Source: malloc.h."""

KEEP_BYTES = 2**31 - 1
SCALED = "float16 needs its loss scaled before gradients are taken, which transformers does around plain layers"
LOGIT_SCALES = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap", "lm_head_multiplier", "output_multiplier",
    "logits_mup_width_multiplier",
)  # fmt: skip
"""Configuration keys of transformers 5.23 for what models do to their logits, or to the head's input, beside the head."""


class Fusion:
    """How the steps of a model are computed.

    Attributes:
        choice: What was chosen, with reasons.
    """

    def __init__(self, choice: Choice, kernels: ModuleType) -> None:
        self.choice, self.kernels, self.switch = choice, kernels, Switch()

    @property
    def autocast(self) -> bool:
        """Whether the model needs autocast around it: fused layers choose their numbers themselves."""
        return not (self.switch.on and self.choice.fused and self.choice.loss_on_trained_tokens)

    @property
    def loss_on_trained_tokens(self) -> bool:
        """Whether `loss` is to be used."""
        return self.switch.on and self.choice.loss_on_trained_tokens

    @contextmanager
    def off(self) -> Iterator[None]:
        """Everything as transformers and peft compute it, for a while."""
        before, self.switch.on = self.switch.on, False
        try:
            yield
        finally:
            self.switch.on = before

    def loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Summed loss of the trained tokens in nats, without logits of the others.

        Args:
            model: The adapted model.
            inputs: A micro-batch of the collator, with ``labels``.
        """
        result: Tensor = FusedLinearCrossEntropy.apply(*self._trained(model, inputs))
        return result

    def token_losses(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The same for each trained token, row by row, shape (tokens,)."""
        result: Tensor = TokenLosses.apply(*self._trained(model, inputs))
        return result

    def _trained(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, ModuleType]:
        """Hidden states that predict trained tokens, the head, those tokens, and who computes the loss."""
        causal = model.get_base_model()
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = causal.get_decoder()(**rest, use_cache=False).last_hidden_state[:, :-1]
        trained = labels[:, 1:] != IGNORED
        head = causal.get_output_embeddings()
        return hidden[trained].to(head.weight.dtype), head.weight, labels[:, 1:][trained], self.kernels


def apply_fusion(
    adapted: Any, config: KernelsConfig, *, placement: Placement, checkpointing: str, fusion_obstacle: str | None = None
) -> Fusion:
    """Fuses what can be fused, in place.

    Args:
        adapted: From `lora.attach`, on its device.
        config: The speed group.
        placement: Device and numbers.
        checkpointing: ``selective`` computes gated activations again on the way back, fused or not.
        fusion_obstacle: Why layers cannot be fused, whatever the model; None where nothing speaks against it.

    Raises:
        HardwareError: A wish that this model or machine cannot fulfil.
    """
    model = adapted.get_base_model()
    facts = facts_of(model, placement)
    choice = choose(
        config,
        dataclasses.replace(facts, fusion_obstacle=fusion_obstacle or facts.fusion_obstacle),
        device=placement.device,
    )
    log("speed", *choice.reasons)
    quick = Fusion(choice, native if choice.native else plain)
    if choice.fused:
        siblings = partial(FusedLinears.of, cache=choice.cached, dtype=getattr(torch, placement.dtype))
        fuse(model, quick, siblings=siblings)
    if checkpointing == "selective":
        gated = blocks.parts(model, blocks.GATED_MLPS)
        if not gated:
            raise HardwareError(
                f"train.checkpointing=selective knows no gated layers in {type(model).__name__}; use full or none"
            )
        for mlp in gated:
            blocks.checkpoint_mlp(mlp)
    if choice.keep_memory:
        keep_memory()
    return quick


def fuse(model: Any, quick: Fusion, *, siblings: Callable[[list[Any]], FusedLinears]) -> None:
    """Puts fused forward passes in the place of the model's."""
    for attention in blocks.parts(model, blocks.ATTENTIONS):
        tiles = quick.choice.tiles and attention.head_dim % native.TILE_WIDTH == 0
        blocks.fuse_attention(attention, siblings=siblings, tiles=tiles, switch=quick.switch)
    for mlp in blocks.parts(model, blocks.GATED_MLPS):
        blocks.fuse_swiglu_mlp(mlp, siblings=siblings, kernels=quick.kernels, switch=quick.switch)
    for norm in blocks.parts(model, blocks.NORMS):
        blocks.fuse_norm(norm, kernels=quick.kernels, switch=quick.switch)


def facts_of(model: Any, placement: Placement) -> Facts:
    """Looks at the model and the machine."""
    linear = _linear_layers(model)
    native_obstacle = (
        native.missing() if placement.device == "cpu" else f"they are for a CPU and this run is on {placement.device}"
    )
    if native_obstacle is None and placement.dtype != "bfloat16":
        native_obstacle = f"they compute in bfloat16 and this run in {placement.dtype}"
    if native_obstacle is None and native.library() is None:
        native_obstacle = "g++ could not compile them"
    return Facts(
        fusion_obstacle=fusion_obstacle(model, placement.dtype),
        quantized=any(library_of(base(layer)) is not None for layer in linear),
        dense_bytes=2 * sum(layer.in_features * layer.out_features for layer in linear),
        free_bytes=_free_bytes(placement.device),
        head_split_obstacle=_no_split(model, placement.dtype),
        native_obstacle=native_obstacle,
        tiles=native_obstacle is None and native.has_tiles(),
        allocator_obstacle=None if sys.platform == "linux" else "only Linux's C library is known to keep it",
    )


def fusion_obstacle(model: Any, dtype: str) -> str | None:
    """Why this model's layers cannot be fused; None where they can."""
    if dtype == "float16":
        return SCALED
    attentions, gated = blocks.parts(model, blocks.ATTENTIONS), blocks.parts(model, blocks.GATED_MLPS)
    if not attentions or not gated:
        return f"{type(model).__name__} is built of other parts than {', '.join(blocks.ATTENTIONS)}"
    if any(type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation") for mlp in gated):
        return "its activation is not SiLU"
    if any(attention.attention_dropout for attention in attentions):
        return "it drops attention at random"
    linear = _linear_layers(model)
    layers = [layer for layer in linear if is_adapted(layer)]
    if any(float(getattr(dropout, "p", 0.0)) for layer in layers for dropout in layer.lora_dropout.values()):
        return "lora.dropout is not 0"
    if any(getattr(layer, "lora_variant", None) for layer in layers):
        return "this variant of LoRA is computed by peft"
    bases = {_kind(base(layer)) for layer in linear}
    odd = sorted(bases - {"Parameter", "Linear4bit"})
    if odd:
        return f"{', '.join(odd)} layers compute in their own way"
    if any(
        parameter.dtype != getattr(torch, dtype)
        for norm in blocks.parts(model, blocks.NORMS)
        for parameter in norm.parameters()
    ):
        return f"model.upcast keeps norms in other numbers than {dtype}"
    return None


def _kind(layer: Any) -> str:
    """The layer's class, or its weight's, where the layer is torch's own."""
    return type(layer.weight).__name__ if type(layer) is torch.nn.Linear else type(layer).__name__


def _linear_layers(model: Any) -> list[Any]:
    """Those that fused layers are made of, adapted or not."""
    fused = blocks.parts(model, (*blocks.ATTENTIONS, *blocks.GATED_MLPS))
    return [layer for part in fused for layer in part.children() if hasattr(layer, "in_features")]


def _no_split(model: Any, dtype: str) -> str | None:
    if dtype == "float16":
        return SCALED
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    if (
        head is None
        or is_adapted(head)
        or type(head).__name__ != "Linear"
        or head.bias is not None
        or head.weight.requires_grad
    ):
        return "its head is no frozen linear layer"
    if head.weight.dtype != getattr(torch, dtype):
        return f"its head is not in {dtype}"
    if any(getattr(text, name, None) not in (None, 1.0) for name in LOGIT_SCALES):
        return "it changes its logits after the head"
    if getattr(text, "output_router_logits", False):
        return "its experts add to the loss"
    return None


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def keep_memory() -> None:
    """Freed activations stay with the process: asking the system for a gigabyte of zeroed pages in each step costs a tenth of it."""
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:  # not glibc
        return
    for name, value in ((MMAP_THRESHOLD, KEEP_BYTES), (TRIM_THRESHOLD, KEEP_BYTES), (TOP_PAD, 2**26)):
        library.mallopt(name, value)
