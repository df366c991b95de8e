"""Chooses the GGUF type of each tensor, as llama.cpp does: its mixes, and its fallbacks if blocks do not divide a row.

Source: llama.cpp build 11549, src/llama-quant.cpp (`tensor_allows_quantization`, `llama_tensor_get_type_impl`,
`tensor_type_fallback`). The library that xllamacpp ships does not contain `llama_model_quantize` itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

QuantType = GGMLQuantizationType


@dataclass(frozen=True)
class QuantMix:
    """The tensor types behind one format name, such as ``q4_k_m``.

    Attributes:
        file_type: The code that is written into the file.
        type: Type of most matrices.
        better: Type of the value and down projections of some layers; None gives them ``type``.
        head: Type of the output matrix, which may be the embedding.
    """

    file_type: LlamaFileType
    type: QuantType
    better: QuantType | None
    head: QuantType


QUANT_MIXES = {
    "f16": QuantMix(LlamaFileType.MOSTLY_F16, QuantType.F16, None, QuantType.F16),
    "bf16": QuantMix(LlamaFileType.MOSTLY_BF16, QuantType.BF16, None, QuantType.BF16),
    "q8_0": QuantMix(LlamaFileType.MOSTLY_Q8_0, QuantType.Q8_0, None, QuantType.Q8_0),
    "q6_k": QuantMix(LlamaFileType.MOSTLY_Q6_K, QuantType.Q6_K, None, QuantType.Q6_K),
    "q5_k_m": QuantMix(LlamaFileType.MOSTLY_Q5_K_M, QuantType.Q5_K, QuantType.Q6_K, QuantType.Q6_K),
    "q4_k_m": QuantMix(LlamaFileType.MOSTLY_Q4_K_M, QuantType.Q4_K, QuantType.Q6_K, QuantType.Q6_K),
    "q4_0": QuantMix(LlamaFileType.MOSTLY_Q4_0, QuantType.Q4_0, None, QuantType.Q6_K),
}

HALVES = (QuantType.F16, QuantType.BF16)

UNQUANTIZED = ("_norm.", "ffn_gate_inp", "shortconv.conv.", "ssm_conv1d.")
"""Norms, routers, the gate of the shared expert, and convolutions."""

FALLBACKS = {QuantType.Q4_K: QuantType.Q5_0, QuantType.Q5_K: QuantType.Q5_1, QuantType.Q6_K: QuantType.Q8_0}
"""Types with blocks of 32 and more bits, for rows whose length is not a multiple of 256."""


def tensor_type(
    name: str, shape: tuple[int, ...], *, mix: QuantMix, layers: int, tied: bool, grouped: bool, experts: int = 0
) -> tuple[QuantType, bool]:
    """Returns the type of one tensor, and whether its shape forced another type than the mix's.

    Args:
        name: In the GGUF, e.g. ``blk.3.ffn_down.weight``.
        shape: Rows, columns.
        mix: The types of the chosen format.
        layers: Number of layers of the model.
        tied: Whether the embedding is the output matrix too.
        grouped: Whether several query heads share a key and a value head.
        experts: Number of experts of a layer; 0 for a dense model.
    """
    if len(shape) < 2 or not name.endswith("weight") or any(part in name for part in UNQUANTIZED):
        return QuantType.F32, False
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        wanted = mix.head
    else:
        wanted = _inner_type(name, mix=mix, layers=layers, grouped=grouped, experts=experts)
    candidates = (wanted, FALLBACKS.get(wanted, wanted), QuantType.F16)
    chosen = next(candidate for candidate in candidates if shape[-1] % GGML_QUANT_SIZES[candidate][0] == 0)
    return chosen, chosen != wanted


def _inner_type(name: str, *, mix: QuantMix, layers: int, grouped: bool, experts: int) -> QuantType:
    """Gives more bits to the first and last eighth of the layers and to every third layer between (the K mixes).

    With eight experts the attention is a small part of the model, and gets more bits.
    """
    if experts == 8 and mix.type not in HALVES and ("attn_v." in name or "attn_k." in name):
        return QuantType.Q8_0
    if experts == 8 and mix.type == QuantType.Q4_K and "attn_output." in name:
        return QuantType.Q5_K
    layer = int(match.group(1)) if (match := re.match(r"blk\.(\d+)\.", name)) else 0
    important = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    values = "attn_v." in name or "attn_qkv." in name
    if mix.better and important and (values or "ffn_down" in name):
        return mix.better
    if values and layers == 80 and grouped and mix.type == QuantType.Q4_K:
        return QuantType.Q5_K  # the 70B models: eight query heads share each value head
    return mix.type


def row_bytes(quant_type: QuantType, columns: int) -> int:
    """Returns the bytes of one row."""
    block, size = GGML_QUANT_SIZES[quant_type]
    return columns // block * size
