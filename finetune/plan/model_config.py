"""transformers' configuration of a model with given dimensions, so that its class can be built without a download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.architecture import ArchitectureConfig
from finetune.errors import ModelError

if TYPE_CHECKING:
    from finetune.config import RunConfig

UNCOUNTED = ("falcon", "gpt_neox")
"""Families whose configuration has other names; they are planned in closed form only."""

LAYER_TYPES = {"f": "full_attention", "s": "sliding_attention", "l": "linear_attention", "c": "conv"}


def transformers_config(config: RunConfig, architecture: ArchitectureConfig) -> Any:
    """Returns a local folder's own configuration, or that of the class with these dimensions.

    Raises:
        ModelError: The class has other names for its dimensions.
    """
    from transformers import AutoConfig

    folder = Path(config.model.name).expanduser()
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder).get_text_config()
    if architecture.family in UNCOUNTED:
        raise ModelError(
            f"plan --exact: {architecture.family} models are planned in closed form only; leave --exact out"
        )
    return config_of_class(architecture)


def config_of_class(architecture: ArchitectureConfig) -> Any:
    """Returns the configuration of the family's class with these dimensions."""
    from transformers import AutoConfig

    a = architecture
    settings = {
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "vocab_size": a.vocab_size,
        "tie_word_embeddings": a.tied_embeddings,
        "max_position_embeddings": a.max_positions,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(a.family, **(settings | _of_family(a)))


def _of_family(a: ArchitectureConfig) -> dict[str, Any]:
    """Returns the settings that only some families have."""
    settings: dict[str, Any] = {}
    if a.family not in ("qwen2", "phi", "phi3"):
        settings["attention_bias"] = a.qkv_bias
    if set(a.letters) != {"f"}:
        settings["layer_types"] = [LAYER_TYPES[letter] for letter in a.letters]
    if a.experts:
        settings |= {
            "num_local_experts": a.experts,
            "num_experts": a.experts,
            "num_experts_per_tok": a.active_experts,
            "moe_intermediate_size": a.intermediate_size,
            "norm_topk_prob": True,
        }
    if a.family == "glm4_moe":
        settings |= {
            "n_routed_experts": a.experts,
            "n_shared_experts": a.shared_size // a.intermediate_size,
            "first_k_dense_replace": a.dense_layers,
            "intermediate_size": a.dense_size or a.intermediate_size,
            "use_qk_norm": a.qk_norm,
        }
    elif a.shared_size:
        settings["shared_expert_intermediate_size"] = a.shared_size
    if a.family.startswith("qwen3_5"):
        settings |= {
            "linear_conv_kernel_dim": a.convolution,
            "linear_num_key_heads": a.linear_key_heads,
            "linear_num_value_heads": a.linear_value_heads,
            "linear_key_head_dim": a.linear_head_dim,
            "linear_value_head_dim": a.linear_head_dim,
        }
    elif a.family.startswith("gemma4"):
        settings |= {
            "global_head_dim": a.full_head_dim,
            "num_global_key_value_heads": a.full_kv_heads or None,
            "attention_k_eq_v": a.full_value_is_key,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": False,
            "final_logit_softcapping": 30.0,
        }
    elif a.family == "lfm2":
        settings |= {"conv_L_cache": a.convolution, "block_auto_adjust_ff_dim": False}
    elif a.family == "granitemoehybrid":
        settings |= {
            "num_local_experts": 0,
            "shared_intermediate_size": a.intermediate_size,
            "layer_types": ["full_attention"] * a.layers,
            "position_embedding_type": "rope",
        }
    return settings
