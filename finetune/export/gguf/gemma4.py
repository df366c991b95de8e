"""Writes what Gemma 4 has of its own: layers of full attention with other heads, whose rotation spares dimensions.

Source: llama.cpp build 11549, conversion/gemma.py and src/models/gemma4.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter

NOT_ROTATED = 1e30
"""Divisor of the frequency of a pair of dimensions that is not rotated."""


def full_layer(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the layers of full attention: those of all layers, and what differs."""
    differing: dict[Any, dict[str, Any]] = settings.get("per_layer_config") or {}
    return settings | next(iter(differing.values()), {})


def unwritten(settings: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yields what a Gemma 4 may have and this export does not write."""
    yield "per-layer embeddings", bool(settings.get("hidden_size_per_layer_input"))
    yield "keys and values that layers share", bool(settings.get("num_kv_shared_layers"))
    yield "a dense block next to experts", bool(settings.get("enable_moe_block"))


def write_fields(writer: GGUFWriter, settings: dict[str, Any]) -> None:
    """Writes the dimensions of the layers with a sliding window, and which layers these are."""
    writer.add_key_length_swa(settings["head_dim"])
    writer.add_value_length_swa(settings["head_dim"])
    writer.add_rope_dimension_count_swa(settings["head_dim"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in settings["layer_types"]])
    writer.add_embedding_length_per_layer_input(0)
    writer.add_shared_kv_layers(0)


def kv_heads(settings: dict[str, Any]) -> list[int]:
    """Returns the key and value heads of each layer."""
    full, sliding = full_layer(settings)["num_key_value_heads"], settings["num_key_value_heads"]
    return [int(full if kind == "full_attention" else sliding) for kind in settings["layer_types"]]


def rope_factors(head_dim: int, rope: dict[str, Any]) -> list[float]:
    """Returns the divisors of the frequencies of full attention: the first pairs of dimensions are rotated."""
    rotated, pairs = int(head_dim * rope["partial_rotary_factor"] / 2), head_dim // 2
    return [1.0] * rotated + [NOT_ROTATED] * (pairs - rotated)
