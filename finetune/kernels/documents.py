"""transformers' layers over packed documents: an attention that needs no mask of tokens by tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune.kernels.attention import Documents

NAME = "finetune_documents"
"""``attn_implementation`` of models that compute with it."""

ATTENTIONS = (
    "CohereAttention",
    "Gemma3Attention",
    "GemmaAttention",
    "Glm4Attention",
    "GraniteAttention",
    "LlamaAttention",
    "Ministral3Attention",
    "MinistralAttention",
    "MistralAttention",
    "MixtralAttention",
    "Olmo2Attention",
    "Olmo3Attention",
    "Phi3Attention",
    "Qwen2Attention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
    "SmolLM3Attention",
)
"""Classes of transformers 5.23 that give mask, scale and window to the attention function and nothing else that changes
the scores: neither a soft cap (Gemma 2) nor sinks (gpt-oss)."""

LEAST_CAPABILITY, WIDEST_HEAD, HEAD_MULTIPLE = (8, 0), 256, 8
"""What torch's FlashAttention supports. Source: aten/src/ATen/native/transformers/cuda/flash_attn, torch 2.13."""

_current: ContextVar[Documents | None] = ContextVar("documents", default=None)


def documents_obstacle(model: Any) -> str | None:
    """Returns why a model's attention cannot be computed document by document; None where it can."""
    if model.config._attn_implementation not in ("sdpa", NAME):
        return f"model.attention={model.config._attn_implementation} has its own way"
    attentions = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    unknown = sorted({type(module).__name__ for module in attentions} - set(ATTENTIONS))
    if unknown or not attentions:
        return f"{', '.join(unknown) or type(model).__name__} may need more than a window and a scale"
    if any(getattr(module, "attention_dropout", 0.0) for module in attentions):
        return "it has attention dropout"
    return None


def varlen_obstacle(*, device: str, capability: tuple[int, int] | None, dtype: str, widths: set[int]) -> str | None:
    """Returns why torch's varlen attention cannot compute here; None where it can.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``.
        capability: Of the GPU; None without one.
        dtype: Of the computation.
        widths: Of the attention heads.
    """
    if device != "cuda" or capability is None:
        return f"torch's varlen attention is for CUDA, and this run is on {device}"
    if capability < LEAST_CAPABILITY:
        return f"torch's varlen attention needs compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    if dtype not in ("bfloat16", "float16"):
        return f"torch's varlen attention computes in 16 bit, and this run in {dtype}"
    unfit = sorted(width for width in widths if width > WIDEST_HEAD or width % HEAD_MULTIPLE)
    return f"torch's varlen attention has no kernel for heads of width {unfit[0]}" if unfit else None


def use_documents(model: Any) -> None:
    """Makes a model attend by document inside `attending_by`; elsewhere it computes as with ``sdpa``."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)


@contextmanager
def attending_by(documents: Documents | None) -> Iterator[None]:
    """Gives the documents of a flat row to a forward pass; None leaves everything to ``sdpa``.

    The layers get them in place of a mask, so that a recomputed layer has them too.
    """
    token = _current.set(documents)
    try:
        yield
    finally:
        _current.reset(token)


def mask(**arguments: Any) -> Any:
    """Returns the documents in place of a mask, or the mask of ``sdpa``."""
    documents = _current.get()
    return sdpa_mask(**arguments) if documents is None else documents


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Computes attention as transformers calls it; with a mask it is ``sdpa``'s.

    Args:
        module: The layer.
        query: Shape (1, heads, tokens, width).
        key: Shape (1, key heads, tokens, width); ``value`` likewise.
        attention_mask: `Documents`, or a mask.
        settings: ``scaling``, ``sliding_window``, and what only ``sdpa`` uses.

    Returns:
        Shape (1, tokens, heads, width).
    """
    if not isinstance(attention_mask, Documents):
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return result
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    scale = settings.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attention_mask.attend(q, k, v, scale=scale, window=settings.get("sliding_window"))[None], None
