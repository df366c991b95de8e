"""Puts the tensors of gated delta nets (Qwen3.5) into llama.cpp's order and values.

transformers keeps the value heads of one key head together; llama.cpp takes one value head of each key head in turn.
Where both counts are the same, so are the orders. Source: llama.cpp build 11549, conversion/qwen.py and
src/models/qwen35.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

MROPE_SECTIONS = [11, 11, 10]
"""Qwen3.5's division of the rotary dimensions among time, height and width; in a text all three are the same."""

VALUES_LAST, VALUES_ALONE = ("in_proj_qkv", "conv1d"), ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias")
"""Tensors whose last rows belong to value heads, and those whose rows all do."""


def converted(name: str, rows: Tensor, *, settings: dict[str, Any]) -> Tensor:
    """Returns a tensor of a layer's ``linear_attn`` as llama.cpp reads it.

    Args:
        name: In transformers, e.g. ``model.layers.0.linear_attn.in_proj_z.weight``.
        rows: The whole tensor, or its LoRA B.
        settings: Of config.json.
    """
    layer = name.partition(".linear_attn.")[2].removesuffix(".weight")
    if layer == "conv1d":
        rows = rows.squeeze(1)
    if layer == "A_log":
        rows = -rows.float().exp()
    if layer in VALUES_ALONE:
        return value_heads_in_turn(rows, settings=settings)
    if layer in VALUES_LAST:
        keys = 2 * settings["linear_num_key_heads"] * settings["linear_key_head_dim"]
        return torch.cat([rows[:keys], value_heads_in_turn(rows[keys:], settings=settings)])
    return value_heads_in_turn(rows.t(), settings=settings).t().contiguous() if layer == "out_proj" else rows


def value_heads_in_turn(rows: Tensor, *, settings: dict[str, Any]) -> Tensor:
    """Returns rows in llama.cpp's order of value heads, which have as many rows each."""
    keys, values = settings["linear_num_key_heads"], settings["linear_num_value_heads"]
    return rows.reshape(keys, values // keys, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def write_fields(writer: GGUFWriter, settings: dict[str, Any], *, sections: list[int] | None) -> None:
    """Writes the dimensions of the gated delta nets.

    Args:
        writer: Of the file.
        settings: Of config.json.
        sections: ``mrope_section`` of the rotary embedding; None for Qwen3.5's own.
    """
    writer.add_ssm_conv_kernel(settings["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(settings["linear_key_head_dim"])
    writer.add_ssm_group_count(settings["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(settings["linear_num_value_heads"])
    writer.add_ssm_inner_size(settings["linear_value_head_dim"] * settings["linear_num_value_heads"])
    writer.add_full_attention_interval(interval(settings))
    writer.add_rope_dimension_sections([*(sections or MROPE_SECTIONS), 0])


def interval(settings: dict[str, Any]) -> int:
    """Returns the number of the first layer with full attention, counted from 1."""
    types: list[str] = [*settings["layer_types"], "full_attention"]
    return types.index("full_attention") + 1


def is_regular(settings: dict[str, Any]) -> bool:
    """Returns whether full attention comes after the same number of layers each time."""
    every, types = interval(settings), settings["layer_types"]
    return [kind == "full_attention" for kind in types] == [number % every == 0 for number in range(1, len(types) + 1)]
