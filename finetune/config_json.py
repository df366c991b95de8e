"""Reads a model's dimensions from the ``config.json`` that transformers wrote. No weights, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.architecture import ArchitectureConfig
from finetune.errors import ModelError
from finetune.readable import check_sizes, read_object

_GATED_DELTA = {"qk_norm": True, "attention_gate": True}
_GEMMA = {"norms_per_layer": 4, "qk_norm": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral3": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_5_moe_text": _GATED_DELTA,
    "gemma": {},
    "gemma2": {"norms_per_layer": 4, "softcap": True},
    "gemma3_text": _GEMMA,
    "gemma4_text": _GEMMA,
    "gemma4_unified_text": _GEMMA,
    "phi3": {"fused_qkv": True, "fused_gate_up": True},
    "phi": {"mlp": "plain", "linear_bias": True, "head_bias": True, "norms_per_layer": 1, "norm_bias": True},
    "gpt_neox": {"mlp": "plain", "linear_bias": True, "norm_bias": True, "fused_qkv": True},
    "gpt_oss": {"qkv_bias": True, "output_bias": True, "sinks": True, "expert_bias": True},
    "smollm3": {},
    "olmo3": {"qk_norm": True, "wide_qk_norm": True},
    "lfm2": {"qk_norm": True},
    "glm4": {"norms_per_layer": 4, "fused_gate_up": True},
    "glm4_moe": {},
    "granite": {},
    "granitemoehybrid": {"fused_gate_up": True},
    "mixtral": {},
    "qwen3_moe": {"qk_norm": True},
}
"""What each family has that its config.json does not tell; read in the modelling code of transformers 5.23."""

_PATTERNS = {
    "gemma2": "sf",
    "gemma3_text": "sssssf",
    "gemma4_text": "sssssf",
    "gemma4_unified_text": "sssssf",
    "gpt_oss": "sf",
    "olmo3": "sssf",
    "qwen3_5_text": "lllf",
    "qwen3_5_moe_text": "lllf",
}
"""Layers in order where a config.json does not list them. Source: the configuration classes of transformers 5.23."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {
        "tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "vocab_size": 262_208, "max_position_embeddings": 131_072,
    },
    "gemma4_text": {"tie_word_embeddings": True, "hidden_size_per_layer_input": 256, "global_head_dim": 512},
    "gemma4_unified_text": {"tie_word_embeddings": True, "global_head_dim": 512},
    "smollm3": {"tie_word_embeddings": True},
    "lfm2": {"tie_word_embeddings": True, "block_auto_adjust_ff_dim": True, "conv_L_cache": 3},
    "glm4": {"attention_bias": True},
    "qwen3_5_text": {"linear_conv_kernel_dim": 4},
    "qwen3_5_moe_text": {"linear_conv_kernel_dim": 4},
}  # fmt: skip
"""Settings that a config.json leaves out where they are the class's own. Source: transformers 5.23."""

_NO_OUTPUT_BIAS = ("glm4", "glm4_moe", "qwen2")
"""Families whose ``attention_bias`` does not hold for the layer after attention."""

_LETTERS = {"full_attention": "f", "attention": "f", "sliding_attention": "s", "linear_attention": "l", "conv": "c"}


def from_config_json(path: Path) -> ArchitectureConfig:
    """Reads the dimensions of a local model folder; of an image-text model, those of its text decoder.

    Args:
        path: The folder, or the file itself.

    Raises:
        ModelError: There is no such file, it is not JSON, it lacks a dimension, or its family is unknown.
    """
    file = path / "config.json" if path.is_dir() else path
    content = read_object(
        file, remedy="give the folder that save_pretrained wrote, or dimensions under model.architecture"
    )
    check_sizes(file, content)
    tied = {"tie_word_embeddings": True} if content.get("tie_word_embeddings") else {}  # of the whole or its decoder
    content = {**content.get("text_config", content), **tied}
    try:
        return _from_transformers(content)
    except KeyError as error:
        raise ModelError(
            f"model.name: {file} has no {error.args[0]}; give the dimensions under model.architecture"
        ) from error


def _from_transformers(content: dict[str, Any]) -> ArchitectureConfig:
    family = content["model_type"]
    if family not in FAMILIES:
        raise ModelError(
            f"model.name: no dimensions are known for model_type {family!r}; known are {', '.join(FAMILIES)}. "
            "Give them under model.architecture, or continue without a plan"
        )
    content = {**_DEFAULTS.get(family, {}), **content}
    _check_planned(family, content)
    heads = content["num_attention_heads"]
    experts = content.get("num_local_experts") or content.get("num_experts") or content.get("n_routed_experts") or 0
    bias = {"qkv_bias": True} if content.get("attention_bias") and family != "qwen2" else {}
    if bias and family not in _NO_OUTPUT_BIAS:
        bias["output_bias"] = True
    return ArchitectureConfig(
        **{
            **FAMILIES[family],
            **bias,
            **_layer_fields(family, content),
            "family": family,
            "hidden_size": content["hidden_size"],
            "intermediate_size": _intermediate_size(family, content),
            "layers": content["num_hidden_layers"],
            "heads": heads,
            "kv_heads": content.get("num_key_value_heads") or heads,
            "head_dim": content.get("head_dim") or content["hidden_size"] // heads,
            "vocab_size": content["vocab_size"],
            "tied_embeddings": content.get("tie_word_embeddings", False),
            "max_positions": content["max_position_embeddings"],
            "experts": experts,
            "active_experts": content.get("num_experts_per_tok") or 0 if experts else 0,
        }
    )


def _check_planned(family: str, content: dict[str, Any]) -> None:
    """Refuses what a family may have and the dimensions cannot express."""
    unplanned = {
        "per-layer embeddings": family == "gemma4_text" and content["hidden_size_per_layer_input"],
        "layers that share keys and values": content.get("num_kv_shared_layers"),
        "a dense block next to experts": content.get("enable_moe_block"),
        "Mamba layers": family == "granitemoehybrid"
        and "linear_attention" in _layer_types(content, ["linear_attention"]),
        "a fused expert block": family == "granitemoehybrid" and content.get("num_local_experts", 8),
    }
    found = [name for name, present in unplanned.items() if present]
    if found:
        raise ModelError(
            f"model.name: this {family} has {' and '.join(found)}, which model.architecture cannot express; continue "
            "without a plan"
        )


def _layer_types(content: dict[str, Any], default: list[str]) -> list[str]:
    types: list[str] = content.get("layer_types") or content.get("layers_block_type") or default
    return types


def _layer_fields(family: str, content: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of models whose layers differ."""
    fields: dict[str, Any] = {}
    if family in ("gemma4_text", "gemma4_unified_text"):
        same = bool(content.get("attention_k_eq_v"))
        layers: dict[str, dict[str, Any]] = content.get("per_layer_config") or {}  # as transformers 5 writes it
        full = next(iter(layers.values()), {})
        kv_heads = full.get("num_key_value_heads") or content.get("num_global_key_value_heads")
        fields = {
            "full_head_dim": full.get("head_dim") or content["global_head_dim"],
            "full_kv_heads": kv_heads or 0 if same else 0,
            "full_value_is_key": same,
        }
    elif family.startswith("qwen3_5"):
        fields = {
            "convolution": content["linear_conv_kernel_dim"],
            "linear_key_heads": content["linear_num_key_heads"],
            "linear_value_heads": content["linear_num_value_heads"],
            "linear_head_dim": content["linear_value_head_dim"],
            "shared_size": content.get("shared_expert_intermediate_size") or 0,
        }
    elif family == "lfm2":
        fields = {"convolution": content["conv_L_cache"]}
    elif family == "glm4_moe":
        fields = {
            "qk_norm": bool(content.get("use_qk_norm")),
            "shared_size": content["moe_intermediate_size"] * content.get("n_shared_experts", 1),
            "dense_layers": content.get("first_k_dense_replace", 1),
            "dense_size": content["intermediate_size"],
        }
    pattern = "".join(_LETTERS.get(kind, "") for kind in _layer_types(content, [])) or _PATTERNS.get(family, "")
    if family == "lfm2" and content.get("full_attn_idxs"):
        pattern = "".join("f" if i in content["full_attn_idxs"] else "c" for i in range(content["num_hidden_layers"]))
    return {**fields, "layer_pattern": _shortest(pattern)} if pattern else fields


def _shortest(pattern: str) -> str:
    """Returns the shortest pattern that repeats to this one."""
    lengths = range(1, len(pattern) + 1)
    return next(pattern[:n] for n in lengths if (pattern[:n] * len(pattern))[: len(pattern)] == pattern)


def _intermediate_size(family: str, content: dict[str, Any]) -> int:
    if family == "granitemoehybrid":
        return int(content["shared_intermediate_size"])
    if family == "lfm2":
        size = content.get("block_ff_dim") or content["intermediate_size"]
        if content["block_auto_adjust_ff_dim"]:
            step = content.get("block_multiple_of", 256)
            size = int(content.get("block_ffn_dim_multiplier", 1.0) * int(2 * size / 3))
            size = -(-size // step) * step
        return int(size)
    return int(content.get("moe_intermediate_size") or content["intermediate_size"])
