"""Counts what a decoder's dimensions imply: its linear layers and its parameters. No weights, no torch.

::

    print(parameters(config.model.architecture))
"""

from collections.abc import Iterator
from dataclasses import dataclass

from finetune.architecture import ArchitectureConfig, layer_groups

_BLOOM = {"qkv_proj": "query_key_value", "o_proj": "dense", "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h"}
_NAMES: dict[str, dict[str, str]] = {
    "phi": {"o_proj": "dense", "up_proj": "fc1", "down_proj": "fc2"},
    "falcon": _BLOOM,
    "gpt_neox": _BLOOM,
    "lfm2": {"o_proj": "out_proj", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    "granitemoehybrid": {"gate_up_proj": "input_linear", "down_proj": "output_linear"},
}
"""Names of linear layers by those that Llama has, in the modelling code of transformers 5.23."""

_PARENTS = {"lfm2": "feed_forward", "granitemoehybrid": "shared_mlp"}
_SHARED = {"glm4_moe": "mlp.shared_experts"}
"""Names of the modules that hold the feed-forward layers and the shared expert."""


EXPERTS = "mlp.experts.0"
"""Segments before the names of an expert's layers, for the first of those that are alike."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear layers of one kind, each a matrix of ``out_features`` by ``in_features``.

    Attributes:
        name: Last segment of the name.
        role: The name that Llama gives it.
        parent: The segments between the number of the layer and ``name``.
        layers: Numbers of the decoder layers that have one.
        adapted: Whether it gets an adapter where all linear layers do; gates of width one do not.
        copies: Matrices in each of these layers: one, or one of each expert.
    """

    name: str
    role: str = ""
    parent: str = ""
    in_features: int
    out_features: int
    layers: tuple[int, ...]
    bias: bool = False
    adapted: bool = True
    copies: int = 1

    @property
    def count(self) -> int:
        """Returns the number of matrices."""
        return len(self.layers) * self.copies

    @property
    def weights(self) -> int:
        """Returns the elements of all matrices, without biases."""
        return self.in_features * self.out_features * self.count

    @property
    def biases(self) -> int:
        """Returns the elements of all biases."""
        return self.out_features * self.count if self.bias else 0


def linear_layers(architecture: ArchitectureConfig) -> list[Linear]:
    """Lists the ``nn.Linear`` layers, without the head: those that are quantized and can have adapters.

    Experts are fused 3-D parameters in transformers 5, so they are not listed either; see `expert_layers`.
    """
    names = _NAMES.get(architecture.family, {})
    return [
        Linear(
            name=names.get(role, role),
            role=role,
            parent=parent,
            in_features=in_features,
            out_features=out_features,
            layers=group.indices,
            bias=bias,
            adapted=out_features > 1,
        )
        for group in layer_groups(architecture)
        for mixer in (_MIXERS[group.architecture.mixer], _feed_forward)
        for role, parent, in_features, out_features, bias in mixer(group.architecture)
    ]


def expert_layers(architecture: ArchitectureConfig) -> list[Linear]:
    """Lists the experts' layers as a 4-bit base has them: gate, up and down of each expert, without routers.

    Source: the names in `finetune.quantization.experts`.
    """
    a = architecture
    if not a.experts:
        return []
    layers = tuple(range(a.dense_layers, a.layers))
    widths = {
        "expert_gate": (a.hidden_size, a.intermediate_size),
        "expert_up": (a.hidden_size, a.intermediate_size),
        "expert_down": (a.intermediate_size, a.hidden_size),
    }
    return [
        Linear(
            name=name,
            parent=EXPERTS,
            in_features=width_in,
            out_features=width_out,
            layers=layers,
            bias=a.expert_bias,
            copies=a.experts,
        )
        for name, (width_in, width_out) in widths.items()
    ]


Shape = tuple[str, str, int, int, bool]
"""Role, parent, input width, output width, and whether it has a bias."""


def _attention(a: ArchitectureConfig) -> Iterator[Shape]:
    query, key, bias, parent = a.heads * a.head_dim, a.kv_heads * a.head_dim, a.qkv_bias or a.linear_bias, "self_attn"
    if a.fused_qkv:
        yield "qkv_proj", parent, a.hidden_size, query + 2 * key, bias
    else:
        yield "q_proj", parent, a.hidden_size, query * (2 if a.attention_gate else 1), bias
        yield "k_proj", parent, a.hidden_size, key, bias
        if not a.full_value_is_key:
            yield "v_proj", parent, a.hidden_size, key, bias
    yield "o_proj", parent, query, a.hidden_size, a.output_bias or a.linear_bias


def _linear_attention(a: ArchitectureConfig) -> Iterator[Shape]:
    key, value = a.linear_key_heads * a.linear_head_dim, a.linear_value_heads * a.linear_head_dim
    yield "in_proj_qkv", "linear_attn", a.hidden_size, 2 * key + value, False
    yield "in_proj_z", "linear_attn", a.hidden_size, value, False
    yield "in_proj_b", "linear_attn", a.hidden_size, a.linear_value_heads, False
    yield "in_proj_a", "linear_attn", a.hidden_size, a.linear_value_heads, False
    yield "out_proj", "linear_attn", value, a.hidden_size, False


def _convolution(a: ArchitectureConfig) -> Iterator[Shape]:
    yield "in_proj", "conv", a.hidden_size, 3 * a.hidden_size, False
    yield "out_proj", "conv", a.hidden_size, a.hidden_size, False


def _feed_forward(a: ArchitectureConfig) -> Iterator[Shape]:
    width = a.shared_size if a.experts else a.intermediate_size
    parent = _SHARED.get(a.family, "mlp.shared_expert") if a.experts else _PARENTS.get(a.family, "mlp")
    if not width:
        return
    if a.fused_gate_up:
        yield "gate_up_proj", parent, a.hidden_size, 2 * width, a.linear_bias
    else:
        for role in ("gate_proj", "up_proj") if a.mlp == "gated" else ("up_proj",):
            yield role, parent, a.hidden_size, width, a.linear_bias
    yield "down_proj", parent, width, a.hidden_size, a.linear_bias
    if a.experts and a.family not in _SHARED:
        yield "shared_expert_gate", "mlp", a.hidden_size, 1, False


_MIXERS = {"attention": _attention, "linear": _linear_attention, "convolution": _convolution}


def linear_parameters(architecture: ArchitectureConfig) -> int:
    """Counts the weights of the layers' linear layers, without biases: what 4-bit quantization compresses."""
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
    inside = sum(_norms_inside(group) * group.layers for group, _ in layer_groups(a))
    return (a.norms_per_layer * a.layers + 1) * a.hidden_size * (2 if a.norm_bias else 1) + inside


def _norms_inside(a: ArchitectureConfig) -> int:
    """Counts the norm weights between the linear layers of one layer."""
    if a.mixer == "linear":
        return a.linear_head_dim
    if a.mixer == "convolution" or not a.qk_norm:
        return 0
    return (a.heads + a.kv_heads) * a.head_dim if a.wide_qk_norm else 2 * a.head_dim


def mixer_parameters(architecture: ArchitectureConfig) -> int:
    """Counts the weights of attention sinks, convolutions and decay rates, which are never quantized."""
    return sum(_mixer_inside(group) * group.layers for group, _ in layer_groups(architecture))


def _mixer_inside(a: ArchitectureConfig) -> int:
    if a.mixer == "convolution":
        return a.hidden_size * a.convolution
    if a.mixer == "linear":
        channels = (2 * a.linear_key_heads + a.linear_value_heads) * a.linear_head_dim
        return channels * a.convolution + 2 * a.linear_value_heads  # A_log and dt_bias
    return a.heads if a.sinks else 0


def expert_parameters(architecture: ArchitectureConfig) -> int:
    """Counts the weights of all experts and routers: `expert_layers`, and those of the routers."""
    a = architecture
    matrices = 3 if a.mlp == "gated" else 2
    weights = matrices * a.hidden_size * a.intermediate_size + a.hidden_size
    biases = (matrices - 1) * a.intermediate_size + a.hidden_size + 1 if a.expert_bias else 0
    return (a.layers - a.dense_layers) * a.experts * (weights + biases)


def parameters(architecture: ArchitectureConfig) -> int:
    """Counts every stored element of the model, tied weights once."""
    biases = sum(linear.biases for linear in linear_layers(architecture))
    inside = linear_parameters(architecture) + biases + expert_parameters(architecture)
    other = norm_parameters(architecture) + mixer_parameters(architecture)
    return inside + other + embedding_parameters(architecture) + head_parameters(architecture)
