"""A decoder's dimensions: what `model.architecture` holds. No weights, no download, no torch.

::

    architecture = from_config_json(Path("my-model"))  # finetune.config_json
    print(parameters(architecture))  # finetune.parameters
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

DELTA_CHUNK = 64
"""Tokens of one chunk of the gated delta rule. Source: transformers 5.23, ``torch_chunk_gated_delta_rule``."""

LETTERS = "fslc"
NEEDED = {
    "l": ("linear_key_heads", "linear_value_heads", "linear_head_dim", "convolution"),
    "c": ("convolution",),
}
"""Dimensions of layers of one kind."""

SIZES = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size", "max_positions")
"""Dimensions that every model has."""


@dataclass(kw_only=True, slots=True)
class ArchitectureConfig:
    """Describes a decoder-only transformer by its dimensions, in elements."""

    family: str
    """The ``model_type`` of transformers, for example ``llama``; decides the names of the linear layers."""

    hidden_size: int
    """Width of the residual stream."""

    intermediate_size: int
    """Width inside the feed-forward block (of each expert, where there are experts)."""

    layers: int
    """Decoder blocks."""

    heads: int
    """Query heads."""

    kv_heads: int
    """Key and value heads; fewer than ``heads`` in grouped-query attention."""

    head_dim: int
    """Width of one head; ``heads * head_dim`` need not equal ``hidden_size`` (Gemma, Qwen3)."""

    vocab_size: int
    """Rows of the embedding."""

    tied_embeddings: bool
    """The output head is the embedding, so it is stored once."""

    max_positions: int
    """Longest sequence in tokens that the model supports."""

    layer_pattern: str = "f"
    """One letter for each layer, repeated for all of them: ``f`` full attention, ``s`` attention within a sliding
    window, ``l`` linear attention (gated delta net), ``c`` short convolution."""

    experts: int = 0
    """Feed-forward experts per block; 0 for a dense model."""

    active_experts: int = 0
    """Experts that one token passes through."""

    shared_size: int = 0
    """``intermediate_size`` of the expert that every token passes through (Qwen3.5 MoE, GLM-4.5); 0 for none."""

    dense_layers: int = 0
    """First layers without experts (GLM-4.5)."""

    dense_size: int = 0
    """``intermediate_size`` of the first layers without experts."""

    expert_bias: bool = False
    """Experts and routers have biases (gpt-oss)."""

    mlp: str = "gated"
    """``gated`` (gate, up, down) or ``plain`` (up, down)."""

    fused_qkv: bool = False
    """Query, key and value are one linear layer, and so one LoRA target (Phi-3, Falcon)."""

    fused_gate_up: bool = False
    """Gate and up are one linear layer (Phi-3)."""

    qkv_bias: bool = False
    """Query, key and value have a bias (Qwen2)."""

    output_bias: bool = False
    """The linear layer after attention has a bias (gpt-oss)."""

    linear_bias: bool = False
    """Every linear layer of the block has a bias (Phi-2, GPT-NeoX)."""

    head_bias: bool = False
    """The output head has a bias (Phi-2)."""

    norms_per_layer: int = 2
    """Normalisations of the residual's width per block: 2 in Llama, 4 in Gemma 2 and 3, 1 in Phi-2."""

    norm_bias: bool = False
    """LayerNorm with a bias instead of RMSNorm."""

    qk_norm: bool = False
    """Query and key heads are normalised, with a weight of ``head_dim`` each (Qwen3, Gemma 3)."""

    wide_qk_norm: bool = False
    """Queries and keys are normalised over all heads, with a weight for each of their elements (OLMo 3)."""

    sinks: bool = False
    """Each query head has a trained score of its own in the softmax (gpt-oss)."""

    attention_gate: bool = False
    """``q_proj`` is twice as wide: its second half gates the attention's output (Qwen3.5)."""

    full_head_dim: int = 0
    """``head_dim`` of ``f`` layers (Gemma 4); 0 where all layers are alike."""

    full_kv_heads: int = 0
    """``kv_heads`` of ``f`` layers (Gemma 4); 0 where all layers are alike."""

    full_value_is_key: bool = False
    """``f`` layers use their keys as values, without a ``v_proj`` (Gemma 4)."""

    convolution: int = 0
    """Tokens that the convolutions of ``c`` and ``l`` layers span."""

    linear_key_heads: int = 0
    """Key heads of ``l`` layers."""

    linear_value_heads: int = 0
    """Value heads of ``l`` layers."""

    linear_head_dim: int = 0
    """Width of one head of ``l`` layers."""

    softcap: bool = False
    """Attention scores are capped by a tanh, which only the newest fused attention kernels support (Gemma 2)."""

    def problems(self) -> Iterator[str]:
        """Yields one sentence for each invalid dimension."""
        for name in SIZES:
            if getattr(self, name) < 1:
                yield f"model.architecture.{name} must be at least 1; got {getattr(self, name)}"
        if self.kv_heads > 0 and self.heads % self.kv_heads:
            yield f"model.architecture.kv_heads must divide heads ({self.heads}); got {self.kv_heads}"
        if self.mlp not in ("gated", "plain"):
            yield f"model.architecture.mlp must be gated or plain; got {self.mlp!r}"
        if self.active_experts > self.experts:
            limit = f"at most experts ({self.experts})"
            yield f"model.architecture.active_experts must be {limit}; got {self.active_experts}"
        if not self.layer_pattern or set(self.layer_pattern) - set(LETTERS):
            yield f"model.architecture.layer_pattern must consist of {', '.join(LETTERS)}; got {self.layer_pattern!r}"
        for letters, names in NEEDED.items():
            missing = [name for name in names if getattr(self, name) < 1]
            if missing and set(letters) & set(self.layer_pattern):
                yield (
                    f"model.architecture.{missing[0]} must be at least 1 for layer_pattern {self.layer_pattern!r}; "
                    f"got {getattr(self, missing[0])}"
                )
        if self.full_kv_heads > 0 and self.heads % self.full_kv_heads:
            yield f"model.architecture.full_kv_heads must divide heads ({self.heads}); got {self.full_kv_heads}"
        if not 0 <= self.dense_layers <= self.layers:
            yield f"model.architecture.dense_layers must be at most layers ({self.layers}); got {self.dense_layers}"

    @property
    def letters(self) -> str:
        """Returns the letter of each layer. The last layer of Gemma 4 always has full attention."""
        letters = (self.layer_pattern * self.layers)[: self.layers]
        return letters[:-1] + "f" if self.family.startswith("gemma4") and self.full_head_dim else letters

    @property
    def mixer(self) -> str:
        """Returns what mixes the tokens of layers that are all alike: ``attention``, ``linear`` or ``convolution``."""
        return {"l": "linear", "c": "convolution"}.get(self.layer_pattern, "attention")


class LayerGroup(NamedTuple):
    """Layers that are alike: their dimensions as a model of these layers alone, and their numbers in the model."""

    architecture: ArchitectureConfig
    indices: tuple[int, ...]


def layer_groups(architecture: ArchitectureConfig) -> list[LayerGroup]:
    """Groups the layers by their dimensions, in the order of first appearance; most models have one group."""
    groups: dict[tuple[str, bool], list[int]] = {}
    a = architecture
    for index, letter in enumerate(a.letters):
        kind = "f" if letter == "s" and not a.full_head_dim else letter
        groups.setdefault((kind, index < a.dense_layers), []).append(index)
    return [
        LayerGroup(_alone(a, kind, dense, len(indices)), tuple(indices)) for (kind, dense), indices in groups.items()
    ]


def _alone(architecture: ArchitectureConfig, kind: str, dense: bool, layers: int) -> ArchitectureConfig:
    a, full = architecture, kind == "f" and architecture.full_head_dim > 0
    return dataclasses.replace(
        a,
        layer_pattern=kind,
        layers=layers,
        dense_layers=0,
        intermediate_size=a.dense_size if dense else a.intermediate_size,
        experts=0 if dense else a.experts,
        active_experts=0 if dense else a.active_experts,
        shared_size=0 if dense else a.shared_size,
        head_dim=a.full_head_dim if full else a.head_dim,
        kv_heads=(a.full_kv_heads or a.kv_heads) if full else a.kv_heads,
        full_head_dim=0,
        full_kv_heads=0,
        full_value_is_key=a.full_value_is_key and kind == "f",
    )
