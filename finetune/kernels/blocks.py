"""Which parts of which models are fused, and what their forward passes become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from finetune.kernels.attention import Shape, attend
from finetune.kernels.autograd import RmsNorm, SwiGlu
from finetune.kernels.linear import FusedLinears

ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
"""transformers' classes whose forward is: q, k, v; rotary positions; attention; o. Read in transformers 5.23."""

GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Those that are: down(silu(gate) * up)."""

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
"""Those that are: weight * x / rms(x), rounded before the weight."""

Forward = Callable[..., Any]


@dataclass(slots=True)
class Switch:
    """Turns every fused part of a model off and on again, so that both ways can be compared."""

    on: bool = True


def parts(model: Any, names: tuple[str, ...]) -> list[Any]:
    """The model's modules of certain classes."""
    return [module for module in model.modules() if type(module).__name__ in names]


def fuse_attention(
    attention: Any, *, siblings: Callable[[list[Any]], FusedLinears], tiles: bool, switch: Switch
) -> None:
    """Documents whose borders are given are attended to one by one; anything else goes the module's own way."""
    plain: Forward = attention.forward
    joint, output = siblings([attention.q_proj, attention.k_proj, attention.v_proj]), siblings([attention.o_proj])
    config = attention.config
    shape = Shape(config.num_attention_heads, config.num_key_value_heads, attention.head_dim, attention.scaling)
    window = (
        attention.sliding_window if hasattr(attention, "sliding_window") else getattr(config, "sliding_window", None)
    )

    def forward(hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, None]:
        borders = inputs.get("cu_seq_lens_q")
        too_long = window is not None and borders is not None and inputs["max_length_q"] > window
        if not switch.on or borders is None or too_long or joint.plain or output.plain:
            result: tuple[Tensor, None] = plain(hidden_states=hidden_states, **inputs)
            return result
        cosine, sine = inputs["position_embeddings"]
        found = attend(joint(hidden_states[0]), cosine[0], sine[0], borders=borders, shape=shape, tiles=tiles)
        return output(found)[None], None

    attention.forward = forward


def fuse_swiglu_mlp(
    mlp: Any, *, siblings: Callable[[list[Any]], FusedLinears], kernels: ModuleType, switch: Switch
) -> None:
    """Gate and up as one product, their activation as one step."""
    plain: Forward = mlp.forward
    both, down = siblings([mlp.gate_proj, mlp.up_proj]), siblings([mlp.down_proj])
    step = SwiGlu(kernels)

    def forward(x: Tensor) -> Tensor:
        if not switch.on or both.plain or down.plain or x.dtype != both.dtype:
            result: Tensor = plain(x)
            return result
        tokens = x.reshape(-1, x.shape[-1])
        return down(both(tokens), step).view(x.shape)

    mlp.forward = forward


def fuse_norm(norm: Any, *, kernels: ModuleType, switch: Switch) -> None:
    """The norm as one step."""
    plain: Forward = norm.forward

    def forward(x: Tensor) -> Tensor:
        if not switch.on or x.dtype != norm.weight.dtype or norm.weight.requires_grad:
            result: Tensor = plain(x)
            return result
        y: Tensor = RmsNorm.apply(x.contiguous(), norm.weight, norm.variance_epsilon, kernels)
        return y

    norm.forward = forward


def checkpoint_mlp(mlp: Any) -> None:
    """``checkpointing=selective``: the widest activations are computed again on the way back instead of kept."""
    inner: Forward = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            result: Tensor = inner(x)
            return result
        again: Tensor = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
        return again

    mlp.forward = forward
