"""Which numbers each tensor is written in: llama.cpp's own mixtures, and its way out where rows do not divide.

Source: llama.cpp build 11549, src/llama-quant.cpp (`tensor_allows_quantization`, `llama_tensor_get_type_impl`,
`tensor_type_fallback`). Its `llama_model_quantize` itself is not in the library that xllamacpp ships.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

Kind = GGMLQuantizationType


@dataclass(frozen=True)
class Mixture:
    """What a format's name stands for.

    Attributes:
        file_type: As it is written into the file.
        kind: Of most matrices.
        better: Of the value and down projections of some layers, or None for no others.
        head: Of the output matrix, which may be the embedding.
    """

    file_type: LlamaFileType
    kind: Kind
    better: Kind | None
    head: Kind


MIXTURES = {
    "f16": Mixture(LlamaFileType.MOSTLY_F16, Kind.F16, None, Kind.F16),
    "bf16": Mixture(LlamaFileType.MOSTLY_BF16, Kind.BF16, None, Kind.BF16),
    "q8_0": Mixture(LlamaFileType.MOSTLY_Q8_0, Kind.Q8_0, None, Kind.Q8_0),
    "q6_k": Mixture(LlamaFileType.MOSTLY_Q6_K, Kind.Q6_K, None, Kind.Q6_K),
    "q5_k_m": Mixture(LlamaFileType.MOSTLY_Q5_K_M, Kind.Q5_K, Kind.Q6_K, Kind.Q6_K),
    "q4_k_m": Mixture(LlamaFileType.MOSTLY_Q4_K_M, Kind.Q4_K, Kind.Q6_K, Kind.Q6_K),
    "q4_0": Mixture(LlamaFileType.MOSTLY_Q4_0, Kind.Q4_0, None, Kind.Q6_K),
}

INSTEAD = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""For rows that are no multiple of 256: wider blocks of 32."""


def kind_of(
    name: str, shape: tuple[int, ...], *, mixture: Mixture, layers: int, tied: bool, grouped: bool
) -> tuple[Kind, bool]:
    """The type of one tensor, and whether its shape forced another one than the mixture's.

    Args:
        name: In the GGUF, e.g. ``blk.3.ffn_down.weight``.
        shape: Rows, columns.
        mixture: The format.
        layers: Of the model.
        tied: Whether the embedding is the output matrix too.
        grouped: Whether several query heads share a key and a value head.
    """
    if len(shape) < 2 or not name.endswith("weight") or "_norm." in name:
        return Kind.F32, False
    wanted = mixture.kind
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        wanted = mixture.head
    else:
        wanted = _mixed(name, mixture=mixture, layers=layers, grouped=grouped)
    fits = [
        kind for kind in (wanted, INSTEAD.get(wanted, wanted), Kind.F16) if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
    ]
    return fits[0], fits[0] != wanted


def _mixed(name: str, *, mixture: Mixture, layers: int, grouped: bool) -> Kind:
    """The K mixtures: more bits for the first and last eighth of the layers and for every third between."""
    layer = int(found.group(1)) if (found := re.match(r"blk\.(\d+)\.", name)) else 0
    chosen = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    values = "attn_v." in name or "attn_qkv." in name
    if mixture.better and chosen and (values or "ffn_down." in name):
        return mixture.better
    if values and layers == 80 and grouped and mixture.kind == Kind.Q4_K:
        return Kind.Q5_K  # the 70B models: eight query heads lean on each value head
    return mixture.kind


def row_bytes(kind: Kind, columns: int) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return columns // block * size
