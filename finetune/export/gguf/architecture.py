"""Maps a model to llama.cpp: its settings to GGUF fields, its tensors to GGUF tensors.

Source: llama.cpp build 11549, conversion/{base,llama,qwen,gemma,phi}.py; tensor names come from the gguf package.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, TensorNameMap, get_tensor_name_map

from finetune.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """A model family in llama.cpp.

    Attributes:
        arch: llama.cpp's own name.
        interleaved_rope: Whether rotary embedding rotates neighbouring dimensions; transformers rotates halves of a
            head.
        norm_shift: Added to norm weights, which transformers stores as a difference from one.
        sliding_window: Whether llama.cpp implements attention within a sliding window for this family.
    """

    arch: MODEL_ARCH
    interleaved_rope: bool = False
    norm_shift: float = 0.0
    sliding_window: bool = False


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, interleaved_rope=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, interleaved_rope=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "phi3": Architecture(MODEL_ARCH.PHI3),
    "gemma": Architecture(MODEL_ARCH.GEMMA, norm_shift=1.0),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, norm_shift=1.0, sliding_window=True),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, norm_shift=1.0, sliding_window=True),
}
"""By ``model_type`` of config.json."""


class Layout:
    """The GGUF fields and tensor names of one model.

    Args:
        folder: Holds the model's config.json.

    Raises:
        ExportError: The architecture or its rotary scaling is not supported.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if model_type not in ARCHITECTURES:
            raise ExportError(
                f"GGUF export knows {', '.join(ARCHITECTURES)}; {folder} is a {model_type}: ship it as safetensors"
            )
        settings: dict[str, Any] = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
        self.settings = settings
        self.architecture = ARCHITECTURES[model_type]
        self.layers = int(settings["num_hidden_layers"])
        self.heads = int(settings["num_attention_heads"])
        self.kv_heads = int(settings.get("num_key_value_heads") or self.heads)
        self.head_dim = int(settings.get("head_dim") or settings["hidden_size"] // self.heads)
        self.tied = bool(settings.get("tie_word_embeddings"))
        ropes = settings["rope_parameters"]
        self.rope: dict[str, Any] = ropes.get("full_attention", ropes)
        self.local_rope: dict[str, Any] | None = ropes.get("sliding_attention")
        if self.rope["rope_type"] not in ("default", "linear", "llama3"):
            raise ExportError(
                "GGUF export knows rotary embeddings of the types default, linear and llama3; "
                f"{folder} has {self.rope['rope_type']}: ship it as safetensors"
            )
        self._names: TensorNameMap = get_tensor_name_map(self.architecture.arch, self.layers)

    @property
    def context(self) -> int:
        """Returns the context in tokens: the model's, or its sliding window if llama.cpp would ignore that window."""
        longest, window = int(self.settings["max_position_embeddings"]), self._window
        return min(longest, window) if window and not self.architecture.sliding_window else longest

    @property
    def _window(self) -> int | None:
        types = self.settings.get("layer_types")
        slides = "sliding_attention" in types if types else self.settings.get("use_sliding_window", True)
        window = self.settings.get("sliding_window")
        return int(window) if window and slides else None

    def notes(self) -> list[str]:
        """Returns one sentence for each difference from the original model."""
        longest = int(self.settings["max_position_embeddings"])
        if self.context < longest:
            return [
                f"the context is cut from {longest:,} to {self.context:,} tokens, "
                "since llama.cpp has no sliding window for this model"
            ]
        return []

    def write_fields(self, writer: GGUFWriter) -> None:
        """Writes the model's settings."""
        settings = self.settings
        writer.add_context_length(self.context)
        writer.add_embedding_length(settings["hidden_size"])
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(settings["intermediate_size"])
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_vocab_size(settings["vocab_size"])
        writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
        writer.add_rope_freq_base(self.rope["rope_theta"])
        writer.add_rope_dimension_count(int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0)))
        if self.local_rope:
            writer.add_rope_freq_base_swa(self.local_rope["rope_theta"])
        if self.rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.rope["factor"])
        if self.architecture.arch == MODEL_ARCH.PHI3:
            writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
            writer.add_sliding_window(0)
        if self.architecture.sliding_window and self._window:
            writer.add_sliding_window(self._window)
        if softcap := settings.get("attn_logit_softcapping"):
            writer.add_attn_logit_softcapping(softcap)
        if softcap := settings.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(softcap)

    def gguf_name(self, name: str) -> str | None:
        """Returns a tensor's name in GGUF; None for a tensor that llama.cpp does not store.

        Raises:
            ExportError: llama.cpp has no such tensor.
        """
        if name.endswith("rotary_emb.inv_freq") or (self.tied and name == "lm_head.weight"):
            return None
        renamed = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise ExportError(
                f"llama.cpp's {self.architecture.arch.name.lower()} has no place for {name}: "
                "ship the model as safetensors"
            )
        return renamed

    def permute_rows(self, name: str, rows: Tensor) -> Tensor:
        """Returns a whole tensor in llama.cpp's row order, and norm weights with their shift added.

        Args:
            name: In transformers, e.g. ``model.layers.0.self_attn.q_proj.weight``.
            rows: All rows of the tensor. Those of a query or key matrix, or of its LoRA B, change places.
        """
        if self.architecture.norm_shift and re.search(r"norm\.weight$", name):
            return rows.float() + self.architecture.norm_shift
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.split(".")[-2])
        if self.architecture.interleaved_rope and heads:
            half = rows.shape[0] // heads // 2
            return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        return rows

    def rope_factors(self) -> list[float] | None:
        """Returns Llama 3's divisors of the rotary frequencies, one per pair of dimensions; None for other models."""
        if self.rope["rope_type"] != "llama3":
            return None
        rope = self.rope
        longest, low, high = (
            rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        factors = []
        for pair in range(0, self.head_dim, 2):
            wavelength = 2 * math.pi * rope["rope_theta"] ** (pair / self.head_dim)
            share = min(max((longest / wavelength - low) / (high - low), 0.0), 1.0)
            factors.append(1 / ((1 - share) / rope["factor"] + share))
        return factors
