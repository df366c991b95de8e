"""Replaces the forward passes of known layer classes by fused ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from finetune.kernels.attention import AttentionShape, Documents, attend
from finetune.kernels.autograd import GatedActivation, RmsNorm
from finetune.kernels.forms import ACTIVATIONS, ATTENTIONS, NORMS
from finetune.kernels.linear import FusedLinears

if TYPE_CHECKING:
    from finetune.kernels.fusion import Fusion

Forward = Callable[..., Any]
FuseLinears = Callable[[list[Any]], FusedLinears]


def modules_of(model: nn.Module, class_names: Iterable[str]) -> list[Any]:
    """Returns the model's modules of these classes."""
    names = set(class_names)
    return [module for module in model.modules() if type(module).__name__ in names]


@dataclass(frozen=True, slots=True)
class QueriesAndKeys:
    """What happens to queries and keys before they are rotated: norms, and a scale that grows with the position.

    Attributes:
        q_norm: Of each head, or of all heads together; None where there is none. ``k_norm`` likewise.
        scale: ``beta`` and ``original`` positions of Llama 4's scale ``1 + beta log(1 + floor(position / original))``.
    """

    q_norm: Any
    k_norm: Any
    scale: tuple[float, int] | None

    @classmethod
    def of(cls, attention: Any) -> QueriesAndKeys:
        """Reads a layer of transformers."""
        scale = None
        if ATTENTIONS[type(attention).__name__].scales_queries:
            rope = attention.config.rope_parameters
            scale = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        return cls(getattr(attention, "q_norm", None), getattr(attention, "k_norm", None), scale)

    def change(
        self, positions: Tensor | None, longest: int
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Returns the change for these positions, shape (1, tokens); None where nothing changes."""
        scale = self.scale if self.scale and longest > self.scale[1] else None  # 1 at the first positions
        if self.q_norm is None and scale is None:
            return None

        def apply(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            if self.q_norm is not None:
                q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
            if scale is not None:
                assert positions is not None
                beta, original = scale
                factor = 1 + beta * torch.log(1 + torch.floor(positions[0] / original))
                q = q * factor[:, None, None].to(q.dtype)
            return q, k

        return apply


def _normed(norm: Any, heads: Tensor) -> Tensor:
    """Normalises each head, or all heads of a token together, as wide as the norm is; shape (tokens, heads, width)."""
    if norm.weight.numel() == heads.shape[-1]:
        return cast(Tensor, norm(heads))
    return cast(Tensor, norm(heads.flatten(1)).view(heads.shape))


def fuse_attention(attention: Any, fusion: Fusion, *, fuse_linears: FuseLinears, tiles: bool) -> None:
    """Computes packed documents one by one. A batch without document boundaries, as in generation, takes the original
    forward pass, with the cached weights where there are some."""
    original: Forward = attention.forward
    inputs_of = (
        [attention.qkv_proj]
        if hasattr(attention, "qkv_proj")
        else [attention.q_proj, attention.k_proj, attention.v_proj]
    )
    qkv, output = fuse_linears(inputs_of), fuse_linears([attention.o_proj])
    if qkv.cached is not None:
        for layer, alone in zip([*inputs_of, attention.o_proj], [*qkv.alone(), output], strict=True):
            use_cached_weight(layer, fusion, alone)
    shape, queries_and_keys = attention_shape(attention), QueriesAndKeys.of(attention)
    rotates = bool(getattr(attention, "use_rope", True))

    def forward(hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, None]:
        starts = inputs.get("cu_seq_lens_q")
        if not fusion.enabled or starts is None or qkv.needs_peft or output.needs_peft:
            result: tuple[Tensor, None] = original(hidden_states=hidden_states, **inputs)
            return result
        cosine, sine = inputs["position_embeddings"]
        documents = inputs.get("attention_mask")
        if not isinstance(documents, Documents):  # a mask, which is not needed
            documents = Documents(starts, inputs["max_length_q"], varlen=fusion.choice.varlen)
        out = attend(
            qkv(hidden_states[0]),
            (cosine[0], sine[0]) if rotates else None,
            documents=documents,
            shape=shape,
            tiles=tiles,
            change=queries_and_keys.change(inputs.get("position_ids"), documents.longest),
        )
        return output(out)[None], None

    attention.forward = forward


def use_cached_weight(layer: Any, fusion: Fusion, alone: FusedLinears) -> None:
    """Computes a layer from its cached dense weight instead of dequantizing it at each use."""
    original: Forward = layer.forward

    def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if not fusion.enabled or alone.needs_peft or x.dtype != alone.dtype:
            result: Tensor = original(x, *arguments, **keywords)
            return result
        return alone(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    layer.forward = forward


def attention_shape(attention: Any) -> AttentionShape:
    """Reads heads, scale, cap and window of a layer of transformers."""
    config, form = attention.config, ATTENTIONS[type(attention).__name__]
    window = config.sliding_window if form.config_window else getattr(attention, "sliding_window", None)
    return AttentionShape(
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        attention.scaling,
        softcap=attention.attn_logit_softcapping if form.softcap else None,
        window=window,
    )


def activation_of(mlp: Any) -> Any:
    """Returns the activation of a gated MLP."""
    return mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn


def fuse_gated_mlp(mlp: Any, fusion: Fusion, *, fuse_linears: FuseLinears) -> None:
    """Computes gate and up as one product, and the gated activation in one pass."""
    original: Forward = mlp.forward
    inputs_of = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
    gate_up, down = fuse_linears(inputs_of), fuse_linears([mlp.down_proj])
    activation = GatedActivation(fusion.kernels, ACTIVATIONS[type(activation_of(mlp)).__name__])

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
    form, eps = NORMS[type(norm).__name__], norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        if not fusion.enabled or x.dtype != norm.weight.dtype or norm.weight.requires_grad:
            result: Tensor = original(x)
            return result
        y: Tensor = RmsNorm.apply(x.contiguous(), norm.weight, eps, fusion.kernels, form)
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
