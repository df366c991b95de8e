"""Maps a model to llama.cpp: its family, and the names, order and values of its tensors.

Source: llama.cpp build 11549, conversion/*.py; tensor names come from the gguf package.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import MODEL_ARCH, TensorNameMap, get_tensor_name_map

from finetune.errors import ExportError
from finetune.export.gguf import delta_net, gemma4
from finetune.model.text_only import config_of_text, decoder_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """A model family in llama.cpp.

    Attributes:
        arch: llama.cpp's own name.
        interleaved_rope: Whether rotary embedding rotates neighbouring dimensions where transformers rotates halves of
            a head.
        norm_shift: Added to norm weights, which transformers stores as a difference from one.
        sliding_window: Whether llama.cpp implements attention within a sliding window for this family.
    """

    arch: MODEL_ARCH
    interleaved_rope: bool = False
    norm_shift: float = 0.0
    sliding_window: bool = False


ARCHITECTURES = {
    "gemma": Architecture(MODEL_ARCH.GEMMA, norm_shift=1.0),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, norm_shift=1.0, sliding_window=True),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, norm_shift=1.0, sliding_window=True),
    "gemma4_text": Architecture(MODEL_ARCH.GEMMA4, sliding_window=True),
    "gemma4_unified_text": Architecture(MODEL_ARCH.GEMMA4, sliding_window=True),
    "glm4": Architecture(MODEL_ARCH.GLM4),
    "glm4_moe": Architecture(MODEL_ARCH.GLM4_MOE),
    "gpt_oss": Architecture(MODEL_ARCH.GPT_OSS, sliding_window=True),
    "granite": Architecture(MODEL_ARCH.GRANITE, interleaved_rope=True),
    "granitemoehybrid": Architecture(MODEL_ARCH.GRANITE, interleaved_rope=True),
    "lfm2": Architecture(MODEL_ARCH.LFM2),
    "llama": Architecture(MODEL_ARCH.LLAMA, interleaved_rope=True),
    "ministral3": Architecture(MODEL_ARCH.MISTRAL3, interleaved_rope=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, interleaved_rope=True),
    "mixtral": Architecture(MODEL_ARCH.LLAMA, interleaved_rope=True),
    "olmo2": Architecture(MODEL_ARCH.OLMO2),
    "olmo3": Architecture(MODEL_ARCH.OLMO2, sliding_window=True),
    "phi": Architecture(MODEL_ARCH.PHI2),
    "phi3": Architecture(MODEL_ARCH.PHI3),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "qwen3_5_moe_text": Architecture(MODEL_ARCH.QWEN35MOE, norm_shift=1.0),
    "qwen3_5_text": Architecture(MODEL_ARCH.QWEN35, norm_shift=1.0),
    "qwen3_moe": Architecture(MODEL_ARCH.QWEN3MOE),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, interleaved_rope=True),
}
"""By ``model_type`` of config.json, of an image-text model by that of its decoder."""


def check_family(family: str | None, *, what: str) -> None:
    """Checks that a ``model_type`` is known; None may be one.

    Raises:
        ExportError: It is not; the message calls the model ``what``.
    """
    if family and family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ExportError(f"GGUF export knows {known}; {what} is a {family}: ship it as safetensors")


TOWERS = "vision|audio|embed_vision|embed_audio|multi_modal|visual|mtp"
"""Beginnings of the names of towers, of what joins them to the decoder, and of layers that predict further tokens."""

PROPORTIONAL = "proportional"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Layout:
    """The family of one model, and its tensors' names and values in GGUF.

    Args:
        folder: Holds the model's config.json.

    Raises:
        ExportError: llama.cpp does not compute what this model computes.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        decoder = config_of_text(folder)
        config = decoder or AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_family(config.model_type, what=str(folder))
        settings: dict[str, Any] = config.to_dict()
        self.folder, self.settings, self.family = folder, settings, config.model_type
        self.image_text = decoder is not None
        self.architecture = ARCHITECTURES[config.model_type]
        self.layers = int(settings["num_hidden_layers"])
        self.heads = int(settings["num_attention_heads"])
        self.kv_heads = int(settings.get("num_key_value_heads") or self.heads)
        self.is_gemma4 = self.architecture.arch == MODEL_ARCH.GEMMA4
        widths = gemma4.full_layer(settings) if self.is_gemma4 else settings
        self.head_dim = int(widths.get("head_dim") or settings["hidden_size"] // self.heads)
        counts = (settings.get(name) for name in ("n_routed_experts", "num_experts", "num_local_experts"))
        self.experts = next((int(count) for count in counts if count), 0)
        self.tied = bool(settings.get("tie_word_embeddings"))
        ropes = settings["rope_parameters"]
        self.rope: dict[str, Any] = ropes.get("full_attention", ropes)
        self.local_rope: dict[str, Any] | None = ropes.get("sliding_attention")
        self._check()
        self._names: TensorNameMap = get_tensor_name_map(self.architecture.arch, self.layers)

    def _check(self) -> None:
        for what, is_so in self._differences():
            if is_so:
                raise ExportError(
                    f"{self.folder} has {what}, which llama.cpp computes otherwise: ship it as safetensors"
                )

        for what, is_so in gemma4.unwritten(self.settings) if self.is_gemma4 else ():
            if is_so:
                raise ExportError(f"{self.folder} has {what}, which GGUF export does not write: ship it as safetensors")

    def _differences(self) -> Iterator[tuple[str, bool]]:
        """Yields what this model may have and llama.cpp's code for its family does not compute."""
        settings, kind = self.settings, self.rope["rope_type"]
        known = kind in ROPE_TYPES or (kind == PROPORTIONAL and self.is_gemma4)
        yield f"rotary embeddings of the type {kind} (known: {', '.join(ROPE_TYPES)})", not known
        usual = 0.1 * math.log(self.rope.get("factor", 1.0)) + 1
        scale = self.rope.get("attention_factor") or usual
        yield f"YaRN with attention_factor {scale}", abs(scale - usual) > 1e-3
        nope = settings.get("no_rope_layers")
        every_fourth = [int((index + 1) % 4 != 0) for index in range(self.layers)]
        yield "other layers without rotary embedding than every fourth", bool(nope) and nope != every_fourth
        if self.family == "qwen3_moe":
            yield "norm_topk_prob=false", not settings["norm_topk_prob"]
        if self.has_delta_nets:
            yield "layers of full attention at other places than every so many", not delta_net.is_regular(settings)
        if self.family == "granitemoehybrid":
            yield "Mamba layers", set(settings["layer_types"]) != {"full_attention"}
            yield "experts in its hybrid class", self.experts > 0
            yield "no rotary embedding", settings.get("position_embedding_type") != "rope"

    @property
    def has_delta_nets(self) -> bool:
        """Returns whether layers are gated delta nets."""
        return "linear_attention" in (self.settings.get("layer_types") or ())

    @property
    def context(self) -> int:
        """Returns the context in tokens: the model's, or its sliding window if llama.cpp would ignore that window."""
        longest = int(self.settings["max_position_embeddings"])
        return min(longest, self.window) if self.window and not self.architecture.sliding_window else longest

    @property
    def window(self) -> int | None:
        """Returns the tokens of the sliding window; None for a model without one."""
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

    def is_left_out(self, name: str) -> bool:
        """Returns whether a tensor of the checkpoint belongs to a tower, or to layers that predict further tokens."""
        name = decoder_name(name)
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer:
            return int(layer.group(1)) >= self.layers
        return self.image_text and not re.match(rf"(model|lm_head)\.(?!{TOWERS})", name)

    def gguf_name(self, name: str) -> str | None:
        """Returns a tensor's name in GGUF; None for a tensor that llama.cpp does not store.

        Raises:
            ExportError: llama.cpp has no such tensor.
        """
        name = decoder_name(name)
        if name.endswith("rotary_emb.inv_freq") or (self.tied and name == "lm_head.weight"):
            return None
        known = re.sub(r"e_score_correction_bias$", "e_score_correction.bias", name)
        known = re.sub(r"layer_scalar$", "layer_scalar.weight", known)
        known = re.sub(r"\.dt_bias$", ".dt_proj.bias", known)
        known = re.sub(r"self_attn\.sinks$", "self_attn.sinks.weight", known)
        known = re.sub(r"shared_mlp\.output_linear", "mlp.down_proj", known)
        renamed = self._names.get_name(known, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise ExportError(
                f"llama.cpp's {self.architecture.arch.name.lower()} has no place for {name}: "
                "ship the model as safetensors"
            )
        return renamed

    def converted(self, name: str, rows: Tensor) -> Tensor:
        """Returns a whole tensor in llama.cpp's row order, and norm weights with their shift added.

        Args:
            name: In transformers, e.g. ``model.layers.0.self_attn.q_proj.weight``.
            rows: All rows of the tensor. Those of a query or key matrix, or of its LoRA B, change places.
        """
        if ".linear_attn." in name:
            return delta_net.converted(name, rows, settings=self.settings)
        if self.architecture.norm_shift and re.search(r"norm\.weight$", name):
            return rows.float() + self.architecture.norm_shift
        if name.endswith("conv.conv.weight"):
            return rows.squeeze(1)
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.split(".")[-2])
        if self.architecture.interleaved_rope and heads:
            half = rows.shape[0] // heads // 2
            return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        return rows

    def rope_factors(self) -> list[float] | None:
        """Returns the divisors of the rotary frequencies, one per pair of dimensions; None for models without them."""
        if self.rope["rope_type"] == PROPORTIONAL:
            return gemma4.rope_factors(self.head_dim, self.rope)
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
