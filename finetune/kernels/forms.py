"""What fused layers know about transformers' classes: the forms that attention, gated MLPs, norms and heads have.

Attributes of the modules say the rest: whether q, k and v are one layer or three, the norms of q and k and their
width, layers without rotary positions, a layer's own window. Importing the module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """What an attention does besides q, k, v, their norms, rotary positions, causal attention and o.

    Attributes:
        config_window: Its window is the configuration's; otherwise the layer's own, or none.
        softcap: Its scores are capped at ``attn_logit_softcapping``.
        scales_queries: Its queries grow with their position, as Llama 4's.
    """

    config_window: bool = False
    softcap: bool = False
    scales_queries: bool = False


@dataclass(frozen=True, slots=True)
class NormForm:
    """``(weight + offset) * x / rms(x)``, rounded to the dtype of ``x`` before the product, or after it."""

    offset: float = 0.0
    rounds_first: bool = True


@dataclass(frozen=True, slots=True)
class GateForm:
    """An activation ``x * sigmoid(linear x + cubic x^3)``."""

    linear: float = 1.0
    cubic: float = 0.0


@dataclass(frozen=True, slots=True)
class HeadForm:
    """Logits are ``factor`` times the head's product, then ``softcap * tanh(logits / softcap)`` where it is set."""

    factor: float = 1.0
    softcap: float | None = None


PLAIN, WINDOW = AttentionForm(), AttentionForm(config_window=True)
ATTENTIONS = {
    "Gemma2Attention": AttentionForm(softcap=True),
    "Gemma3Attention": PLAIN,
    "GemmaAttention": PLAIN,
    "GraniteAttention": PLAIN,
    "LlamaAttention": PLAIN,
    "Ministral3Attention": AttentionForm(config_window=True, scales_queries=True),
    "MinistralAttention": PLAIN,
    "MistralAttention": WINDOW,
    "Olmo2Attention": PLAIN,
    "Olmo3Attention": PLAIN,
    "Phi3Attention": WINDOW,
    "Qwen2Attention": PLAIN,
    "Qwen3Attention": PLAIN,
    "SmolLM3Attention": PLAIN,
}
"""Classes of transformers 5.23 that fused attention computes; tests/kernels/test_families.py compares each."""

GATED_MLPS = tuple(name.replace("Attention", "MLP") for name in ATTENTIONS)
"""Classes whose forward is: down(activation(gate) * up), with one layer for gate and up, or two."""

ROUNDED, WIDE, OFFSET = NormForm(), NormForm(rounds_first=False), NormForm(offset=1.0, rounds_first=False)
NORMS = {
    name.replace("Attention", "RMSNorm"): OFFSET if "Gemma" in name else WIDE if "Olmo" in name else ROUNDED
    for name in ATTENTIONS
}
"""Classes of norms with their form."""

GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
ACTIVATIONS = {
    "GELUTanh": GateForm(GELU_SLOPE, 0.044715 * GELU_SLOPE),  # tanh(y) = 2 sigmoid(2 y) - 1
    "SiLU": GateForm(),
    "SiLUActivation": GateForm(),
}
"""Classes of activations with their form."""

FUSED_FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""``model_type`` of the models whose layers these are."""

DOCUMENT_FAMILIES = (
    "cohere",
    "gemma",
    "gemma3_text",
    "glm4",
    "granite",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
"""``model_type`` of the models whose own attention can be computed document by document: of `documents.ATTENTIONS`."""

LOGIT_CHANGES: dict[str, tuple[str, ...]] = {
    "final_logit_softcapping": ("gemma2", "gemma3_text"),
    "logit_scale": ("cohere", "cohere2"),
    "logits_scaling": ("granite", "granitemoe", "granitemoehybrid", "granitemoeshared"),
    "logits_soft_cap": (),
    "lm_head_multiplier": (),
    "output_multiplier": (),
    "logits_mup_width_multiplier": (),
}
"""Configuration keys of transformers 5.23 for what models do to their logits, or to the head's input, besides the head,
each with the families in which `head_form` knows what it means. HyperCLOVA X multiplies by ``logits_scaling``. Gemma 4
caps too, but its layers stay plain, where TRL's loss needs less memory for its 262,144 words."""


def head_form(config: Any) -> HeadForm | None:
    """Reads what a model does to its logits from its text configuration; None where it is not known.

    Source: transformers 5.23, the models' ``forward``: Granite divides by ``logits_scaling``, Cohere multiplies by
    ``logit_scale``, Gemma 2 caps.
    """
    found = {key: getattr(config, key, None) for key in LOGIT_CHANGES}
    changes = {key: value for key, value in found.items() if value not in (None, 1.0)}
    if any(config.model_type not in LOGIT_CHANGES[key] for key in changes):
        return None
    factor = changes.get("logit_scale", 1.0) / changes.get("logits_scaling", 1.0)
    return HeadForm(factor, changes.get("final_logit_softcapping"))
