"""Replaces the forward passes of known layer classes by fused ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.kernels.attention import AttentionShape, Documents, attend
from finetune.kernels.autograd import RmsNorm, SwiGlu
from finetune.kernels.linear import FusedLinears

if TYPE_CHECKING:
    from finetune.kernels.fusion import Fusion

ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
"""Classes of transformers whose forward is: q, k, v; rotary positions; attention; o. Checked in transformers 5.23."""

GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes whose forward is: down(silu(gate) * up)."""

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
"""Classes whose forward is: weight * x / rms(x), rounded before it is multiplied by the weight."""

Forward = Callable[..., Any]
FuseLinears = Callable[[list[Any]], FusedLinears]


def modules_of(model: nn.Module, class_names: tuple[str, ...]) -> list[Any]:
    """Returns the model's modules of these classes."""
    return [module for module in model.modules() if type(module).__name__ in class_names]


def fuse_attention(attention: Any, fusion: Fusion, *, fuse_linears: FuseLinears, tiles: bool) -> None:
    """Computes packed documents one by one. A batch without document boundaries takes the original forward pass."""
    original: Forward = attention.forward
    qkv, output = fuse_linears([attention.q_proj, attention.k_proj, attention.v_proj]), fuse_linears([attention.o_proj])
    config = attention.config
    shape = AttentionShape(
        config.num_attention_heads, config.num_key_value_heads, attention.head_dim, attention.scaling
    )
    has_own_window = hasattr(attention, "sliding_window")
    window = attention.sliding_window if has_own_window else getattr(config, "sliding_window", None)

    def forward(hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, None]:
        starts = inputs.get("cu_seq_lens_q")
        too_long = window is not None and starts is not None and inputs["max_length_q"] > window
        if not fusion.enabled or starts is None or too_long or qkv.needs_peft or output.needs_peft:
            result: tuple[Tensor, None] = original(hidden_states=hidden_states, **inputs)
            return result
        cosine, sine = inputs["position_embeddings"]
        documents = inputs.get("attention_mask")
        if not isinstance(documents, Documents):  # a mask, which is not needed
            documents = Documents(starts, inputs["max_length_q"], varlen=fusion.choice.varlen)
        out = attend(qkv(hidden_states[0]), cosine[0], sine[0], documents=documents, shape=shape, tiles=tiles)
        return output(out)[None], None

    attention.forward = forward


def fuse_swiglu_mlp(mlp: Any, fusion: Fusion, *, fuse_linears: FuseLinears) -> None:
    """Computes gate and up as one product, and SwiGLU in one pass."""
    original: Forward = mlp.forward
    gate_up, down = fuse_linears([mlp.gate_proj, mlp.up_proj]), fuse_linears([mlp.down_proj])
    activation = SwiGlu(fusion.kernels)

    def forward(x: Tensor) -> Tensor:
        if not fusion.enabled or gate_up.needs_peft or down.needs_peft or x.dtype != gate_up.dtype:
            result: Tensor = original(x)
            return result
        tokens = x.reshape(-1, x.shape[-1])
        return down(gate_up(tokens), activation).view(x.shape)

    mlp.forward = forward


def fuse_norm(norm: Any, fusion: Fusion) -> None:
    """Computes the norm in one pass."""
    original: Forward = norm.forward

    def forward(x: Tensor) -> Tensor:
        if not fusion.enabled or x.dtype != norm.weight.dtype or norm.weight.requires_grad:
            result: Tensor = original(x)
            return result
        y: Tensor = RmsNorm.apply(x.contiguous(), norm.weight, norm.variance_epsilon, fusion.kernels)
        return y

    norm.forward = forward


def checkpoint_mlp(mlp: Any) -> None:
    """Recomputes the MLP's activations, the widest ones, in backward: ``train.checkpointing=selective``."""
    original: Forward = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            result: Tensor = original(x)
            return result
        checkpointed: Tensor = torch.utils.checkpoint.checkpoint(original, x, use_reentrant=False)
        return checkpointed

    mlp.forward = forward
