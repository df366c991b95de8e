"""A decoder's dimensions, and what can be counted from them alone: no weights, no download, no torch.

::

    architecture = from_config_json(Path("my-model"))
    print(parameters(architecture))
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ModelError

# Names of (q, k, v, fused qkv, o, gate, up, fused gate_up, down) in the modelling code of transformers 5.23.
_LLAMA_NAMES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
_BLOOM_NAMES = ("q_proj", "k_proj", "v_proj", "query_key_value", "dense", "", "dense_h_to_4h", "", "dense_4h_to_h")
_NAMES = {
    "phi": ("q_proj", "k_proj", "v_proj", "", "dense", "", "fc1", "", "fc2"),
    "falcon": _BLOOM_NAMES,
    "gpt_neox": _BLOOM_NAMES,
}


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

    experts: int = 0
    """Feed-forward experts per block; 0 for a dense model."""

    active_experts: int = 0
    """Experts that one token passes through."""

    mlp: str = "gated"
    """``gated`` (gate, up, down) or ``plain`` (up, down)."""

    fused_qkv: bool = False
    """Query, key and value are one linear layer, and so one LoRA target (Phi-3, Falcon)."""

    fused_gate_up: bool = False
    """Gate and up are one linear layer (Phi-3)."""

    qkv_bias: bool = False
    """Query, key and value have a bias (Qwen2)."""

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


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear layers of one kind: ``count`` matrices of ``out_features`` by ``in_features``."""

    name: str
    in_features: int
    out_features: int
    count: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Returns the elements of all ``count`` matrices, without biases."""
        return self.in_features * self.out_features * self.count

    @property
    def biases(self) -> int:
        """Returns the elements of all biases."""
        return self.out_features * self.count if self.bias else 0


def linear_layers(architecture: ArchitectureConfig) -> list[Linear]:
    """Lists the block's ``nn.Linear`` layers, without the head: those that are quantized and can have adapters.

    Experts are fused 3-D parameters in transformers 5, not linear layers, so they are not listed either.
    """
    a = architecture
    q_name, k_name, v_name, qkv_name, o_name, gate_name, up_name, gate_up_name, down_name = _NAMES.get(
        a.family, _LLAMA_NAMES
    )
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    bias = a.linear_bias
    qkv_bias = a.qkv_bias or bias
    shapes: list[tuple[str, int, int, bool]] = []
    if a.fused_qkv:
        shapes.append((qkv_name, a.hidden_size, query + 2 * key, qkv_bias))
    else:
        shapes += [
            (q_name, a.hidden_size, query, qkv_bias),
            (k_name, a.hidden_size, key, qkv_bias),
            (v_name, a.hidden_size, key, qkv_bias),
        ]
    shapes.append((o_name, query, a.hidden_size, bias))
    if not a.experts:
        if a.fused_gate_up:
            shapes.append((gate_up_name, a.hidden_size, 2 * a.intermediate_size, bias))
        else:
            names = [gate_name, up_name] if a.mlp == "gated" else [up_name]
            shapes += [(name, a.hidden_size, a.intermediate_size, bias) for name in names]
        shapes.append((down_name, a.intermediate_size, a.hidden_size, bias))
    return [
        Linear(name=name, in_features=in_features, out_features=out_features, count=a.layers, bias=has_bias)
        for name, in_features, out_features, has_bias in shapes
    ]


def linear_parameters(architecture: ArchitectureConfig) -> int:
    """Counts the weights of the block's linear layers, without biases: what 4-bit quantization compresses."""
    return sum(linear.weights for linear in linear_layers(architecture))


def embedding_parameters(architecture: ArchitectureConfig) -> int:
    """Counts the weights of the input embedding."""
    return architecture.vocab_size * architecture.hidden_size


def head_parameters(architecture: ArchitectureConfig) -> int:
    """Counts the weights of the output head; 0 where it is tied to the embedding."""
    if architecture.tied_embeddings:
        return 0
    return embedding_parameters(architecture) + (architecture.vocab_size if architecture.head_bias else 0)


def norm_parameters(architecture: ArchitectureConfig) -> int:
    """Counts weights and biases of every normalisation, the last one included."""
    a = architecture
    wide = (a.norms_per_layer * a.layers + 1) * a.hidden_size * (2 if a.norm_bias else 1)
    return wide + (2 * a.head_dim * a.layers if a.qk_norm else 0)


def expert_parameters(architecture: ArchitectureConfig) -> int:
    """Counts the weights of all experts and routers: fused parameters, which bitsandbytes does not quantize."""
    a = architecture
    if not a.experts:
        return 0
    matrices = 3 if a.mlp == "gated" else 2
    return a.layers * a.experts * (matrices * a.hidden_size * a.intermediate_size + a.hidden_size)


def parameters(architecture: ArchitectureConfig) -> int:
    """Counts every stored element of the model, tied weights once."""
    biases = sum(linear.biases for linear in linear_layers(architecture))
    inside = linear_parameters(architecture) + biases + expert_parameters(architecture) + norm_parameters(architecture)
    return inside + embedding_parameters(architecture) + head_parameters(architecture)


def from_config_json(path: Path) -> ArchitectureConfig:
    """Reads the dimensions of a local model folder from the ``config.json`` that transformers wrote.

    Args:
        path: The folder, or the file itself.

    Raises:
        ModelError: There is no such file, it is not JSON, it lacks a dimension, or its family is unknown.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"model.name: {file} cannot be read: {error.strerror}; a local model folder must contain config.json; give "
            "the dimensions of any other model under model.architecture"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:  # a GGUF is a binary file
        raise ModelError(
            f"model.name: {file} is not JSON: {error}; give the dimensions under model.architecture"
        ) from error
    content = content.get("text_config", content)
    try:
        return _from_transformers(content)
    except KeyError as error:
        raise ModelError(
            f"model.name: {file} has no {error.args[0]}; give the dimensions under model.architecture"
        ) from error


# What each family has that its config.json does not say; read in the modelling code of transformers 5.23.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma": {},
    "gemma2": {"norms_per_layer": 4, "softcap": True},
    "gemma3_text": {"norms_per_layer": 4, "qk_norm": True},
    "phi3": {"fused_qkv": True, "fused_gate_up": True},
    "phi": {"mlp": "plain", "linear_bias": True, "head_bias": True, "norms_per_layer": 1, "norm_bias": True},
    "gpt_neox": {"mlp": "plain", "linear_bias": True, "norm_bias": True, "fused_qkv": True},
    "mixtral": {},
    "qwen3_moe": {"qk_norm": True},
}
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text")


def _from_transformers(content: dict[str, Any]) -> ArchitectureConfig:
    family = content["model_type"]
    if family not in _FAMILIES:
        raise ModelError(
            f"model.name: no dimensions are known for model_type {family!r}; known are {', '.join(_FAMILIES)}. "
            "Give them under model.architecture, or continue without a plan"
        )
    heads = content["num_attention_heads"]
    experts = content.get("num_local_experts") or content.get("num_experts") or 0
    bias = {"qkv_bias": True} if content.get("attention_bias") and family != "qwen2" else {}
    return ArchitectureConfig(
        **{
            **_FAMILIES[family],
            **bias,
            "family": family,
            "hidden_size": content["hidden_size"],
            "intermediate_size": content.get("moe_intermediate_size") or content["intermediate_size"],
            "layers": content["num_hidden_layers"],
            "heads": heads,
            "kv_heads": content.get("num_key_value_heads") or heads,
            "head_dim": content.get("head_dim") or content["hidden_size"] // heads,
            "vocab_size": content["vocab_size"],
            "tied_embeddings": content.get("tie_word_embeddings", family in _TIED_BY_DEFAULT),
            "max_positions": content["max_position_embeddings"],
            "experts": experts,
            "active_experts": content.get("num_experts_per_tok") or 0 if experts else 0,
        }
    )
