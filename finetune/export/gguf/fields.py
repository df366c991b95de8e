"""Writes a model's settings as the fields that llama.cpp reads.

Source: llama.cpp build 11549, conversion/*.py and src/llama-model.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf import MODEL_ARCH, ExpertGatingFuncType, GGUFWriter, RopeScalingType

from finetune.export.gguf import delta_net, gemma4

if TYPE_CHECKING:
    from finetune.export.gguf.architecture import Layout

SCALES = {
    "embedding_multiplier": GGUFWriter.add_embedding_scale,
    "attention_multiplier": GGUFWriter.add_attention_scale,
    "residual_multiplier": GGUFWriter.add_residual_scale,
    "logits_scaling": GGUFWriter.add_logit_scale,
    "attn_logit_softcapping": GGUFWriter.add_attn_logit_softcapping,
    "final_logit_softcapping": GGUFWriter.add_final_logit_softcapping,
    "conv_L_cache": GGUFWriter.add_shortconv_l_cache,
    "layer_norm_eps": GGUFWriter.add_layer_norm_eps,
    "rms_norm_eps": GGUFWriter.add_layer_norm_rms_eps,
    "norm_eps": GGUFWriter.add_layer_norm_rms_eps,
}
"""Settings that are a field of their own, where the model has them."""


def write_fields(writer: GGUFWriter, layout: Layout) -> None:
    """Writes the settings of a model."""
    settings = layout.settings
    writer.add_context_length(layout.context)
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(layout.layers)
    writer.add_feed_forward_length(_feed_forward(layout))
    writer.add_head_count(layout.heads)
    writer.add_head_count_kv(_kv_heads(layout))
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_vocab_size(settings["vocab_size"])
    for name, add in SCALES.items():
        if settings.get(name):
            add(writer, settings[name])
    _write_rope(writer, layout)
    _write_experts(writer, layout)
    if layout.is_gemma4:
        gemma4.write_fields(writer, settings)
    if layout.has_delta_nets:
        delta_net.write_fields(writer, settings, sections=layout.rope.get("mrope_section"))
    if layout.architecture.arch == MODEL_ARCH.PHI3:
        writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        writer.add_sliding_window(0)
    if layout.architecture.sliding_window and layout.window:
        writer.add_sliding_window(layout.window)
        if layout.architecture.arch == MODEL_ARCH.OLMO2:
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in settings["layer_types"]])


def _feed_forward(layout: Layout) -> int:
    settings = layout.settings
    if layout.family == "granitemoehybrid":
        return int(settings["shared_intermediate_size"])
    width = int(settings.get("intermediate_size") or settings["moe_intermediate_size"])
    if not settings.get("block_auto_adjust_ff_dim"):
        return width
    width, multiple = int(settings["block_ffn_dim_multiplier"] * int(2 * width / 3)), settings["block_multiple_of"]
    return int(-(-width // multiple) * multiple)


def _kv_heads(layout: Layout) -> int | list[int]:
    """Returns the number of key and value heads, of each layer where they differ or some are convolutions."""
    if layout.is_gemma4:
        return gemma4.kv_heads(layout.settings)
    types = layout.settings.get("layer_types") or []
    if "conv" not in types:
        return layout.kv_heads
    return [layout.kv_heads if kind == "full_attention" else 0 for kind in types]


def _write_rope(writer: GGUFWriter, layout: Layout) -> None:
    rope = layout.rope
    writer.add_rope_freq_base(rope["rope_theta"])
    share = 1.0 if layout.is_gemma4 else rope.get("partial_rotary_factor", 1.0)  # its divisors say which are rotated
    writer.add_rope_dimension_count(int(layout.head_dim * share))
    if layout.local_rope:
        writer.add_rope_freq_base_swa(layout.local_rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        if rope.get("llama_4_scaling_beta"):
            writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _write_experts(writer: GGUFWriter, layout: Layout) -> None:
    settings = layout.settings
    if not layout.experts:
        return
    writer.add_expert_count(layout.experts)
    writer.add_expert_used_count(settings["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(settings.get("moe_intermediate_size") or settings["intermediate_size"])
    if settings.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(settings["shared_expert_intermediate_size"])
    if layout.architecture.arch == MODEL_ARCH.GLM4_MOE:
        writer.add_expert_shared_count(settings["n_shared_experts"])
        writer.add_leading_dense_block_count(settings["first_k_dense_replace"])
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(settings["routed_scaling_factor"])
        writer.add_expert_weights_norm(settings["norm_topk_prob"])
