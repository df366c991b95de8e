"""The tensors that one decoder layer keeps for its backward pass, each with its bytes.

Counted by hand from what autograd saves in transformers' Llama block and in the fused one of `finetune.kernels`: an
operation on a frozen weight keeps the weight, not its input; element-wise products keep both factors; a cast keeps
nothing. ``plan.exact`` counts the same on the real classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from finetune.architecture import DELTA_CHUNK, ArchitectureConfig
from finetune.parameters import Linear, linear_layers
from finetune.plan.inputs import FLOAT, PlanInputs

PARALLEL = ("phi", "falcon", "gpt_neox")
"""Families whose attention and feed-forward read the same residual, so both normalisations keep one copy of it."""

VALUE_NORMS = ("gemma4_text", "gemma4_unified_text")
"""Families that normalise the values too, without a weight."""

GATED_LAYERS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""Layers that ``train.checkpointing=selective`` recomputes: only their input is kept."""


class SavedTensor(NamedTuple):
    """Tensors of one kind in one layer: their name, the bytes of one for the whole micro-batch, and their number."""

    name: str
    size: float
    number: float = 1

    @property
    def bytes(self) -> float:
        """Returns the bytes of all of them."""
        return self.size * self.number


class InputTensor(NamedTuple):
    """A tensor that linear layers read: its width, the layers, and whether another operation keeps it anyway."""

    width: int
    layers: list[Linear]
    kept_anyway: bool


def layer_tensors(inputs: PlanInputs) -> list[SavedTensor]:
    """Lists everything that one layer keeps."""
    if inputs.kernels.fused:
        tensors = fused_tensors(inputs)
    else:
        parts = (norms, attention, linear_inputs, feed_forward, adapter_copies)
        tensors = (tensor for part in parts for tensor in part(inputs))
    return [tensor for tensor in tensors if tensor.bytes > 0]


def layer_bytes(inputs: PlanInputs) -> float:
    """Sums `layer_tensors`."""
    return sum(tensor.bytes for tensor in layer_tensors(inputs))


def norms(inputs: PlanInputs) -> Iterator[SavedTensor]:
    """Yields what normalisations keep: RMSNorm its input in float32, LayerNorm its input unchanged.

    A trained weight also keeps the normalised value. Query and key norms work on the heads.
    """
    a, tokens = inputs.architecture, inputs.step_tokens
    count = 1 if a.family in PARALLEL else a.norms_per_layer
    each = inputs.compute_bytes if a.norm_bias else inputs.trainer.norm_bytes
    yield SavedTensor("norms", each * a.hidden_size * tokens, count)
    if not inputs.rank:
        yield SavedTensor("norms", inputs.compute_bytes * a.hidden_size * tokens, count)
    if a.qk_norm and a.mixer == "attention":
        yield SavedTensor("norms", each * a.heads * a.head_dim * tokens)
        yield SavedTensor("norms", each * a.kv_heads * a.head_dim * tokens, 2 if a.family in VALUE_NORMS else 1)


def attention(inputs: PlanInputs) -> Iterator[SavedTensor]:
    """Yields query, key, value, output and what the softmax keeps.

    Fused kernels keep the log of the softmax's sum, one float32 per head, and a floating-point mask where documents
    share a row and are not computed one by one. Eager attention keeps the scores of every pair of tokens: in float32
    from the softmax, and cast for the product with the values where that has another dtype; a soft cap also keeps its
    tanh. With sinks, the softmax computes in the dtype of the scores. A gate keeps its sigmoid and a copy of the
    output.
    Source: transformers 5.23, ``eager_attention_forward`` and ``sdpa_attention_forward``; torch's
        ``convert_boolean_attn_mask``.
    """
    a, c, tokens = inputs.architecture, inputs.compute_bytes, inputs.step_tokens
    if a.mixer != "attention":
        yield from (linear_attention if a.mixer == "linear" else convolution)(inputs)
        return
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    eager, flat = inputs.attention == "eager", inputs.kernels.flat
    masked = flat and not inputs.kernels.documents
    held_key = query if inputs.trainer.repeats_kv or eager or masked else key
    held_value = query + 2 * key if (inputs.trainer.keeps_qkv or a.fused_qkv) and held_key == key else held_key
    for width in (query, held_key, held_value):
        yield SavedTensor("attention", c * width * tokens)
    yield SavedTensor("attention", c * query * tokens, 2 if a.attention_gate else 0)
    together = tokens if flat else inputs.tokens
    if not eager:
        yield SavedTensor("attention", c * query * tokens)
        yield SavedTensor("attention", FLOAT * a.heads * tokens)
        yield SavedTensor("mask", c * together * tokens if masked else 0)
        return
    pairs = a.heads * together * tokens
    yield SavedTensor("scores", pairs * FLOAT, 0 if a.sinks else 1)
    yield SavedTensor("scores", pairs * c, 1 if a.sinks or c != FLOAT else 0)
    yield SavedTensor("scores", pairs * c if a.softcap else 0)


def linear_attention(inputs: PlanInputs) -> Iterator[SavedTensor]:
    """Yields what the gated delta rule in plain torch keeps: tensors as wide as the values, pairs of a chunk's tokens,
    and a state for each chunk. It computes in float32; autocast's products keep copies in the compute dtype instead,
    or besides. fla's kernels keep less; this project does not use them.

    Source: transformers 5.23, ``torch_chunk_gated_delta_rule`` and ``Qwen3_5GatedDeltaNet.forward``.
    """
    a, c, tokens = inputs.architecture, inputs.compute_bytes, inputs.step_tokens
    value = a.linear_value_heads * a.linear_head_dim
    channels = 2 * a.linear_key_heads * a.linear_head_dim + value
    pairs = a.linear_value_heads * DELTA_CHUNK * tokens
    states = value * a.linear_head_dim * tokens / DELTA_CHUNK
    autocast = inputs.trainer.reduced_input_copies and c != FLOAT
    yield SavedTensor("attention", c * channels * tokens, 2)  # the convolution's input and output
    yield SavedTensor("attention", FLOAT * value * tokens, 11 if autocast else 14)
    yield SavedTensor("attention", c * value * tokens, 10 if autocast else 1)
    yield SavedTensor("attention", FLOAT * pairs, 2 if autocast else 5)
    yield SavedTensor("attention", c * pairs, 3 if autocast else 0)
    yield SavedTensor("attention", FLOAT * states)
    yield SavedTensor("attention", c * states, 2 if autocast else 0)


def convolution(inputs: PlanInputs) -> Iterator[SavedTensor]:
    """Yields what a gated short convolution keeps: its three projections, and the convolution's input and output.

    Source: transformers 5.23, ``Lfm2ShortConv.forward``.
    """
    width = inputs.compute_bytes * inputs.architecture.hidden_size * inputs.step_tokens
    yield SavedTensor("attention", 3 * width)
    yield SavedTensor("attention", width, 2)


def linear_inputs(inputs: PlanInputs) -> Iterator[SavedTensor]:
    """Yields inputs of linear layers, kept for the gradient of A, and of the layer itself where it trains.

    Without dropout, layers that read the same tensor share it. With dropout, each branch keeps the dropped input and a
    mask: of one byte on a GPU, in the adapter's dtype on a CPU. Where adapters are float32 under autocast, each branch
    keeps its own cast copy. LLM.int8 keeps its input. Source: bitsandbytes 0.50, ``MatMul8bitLt.forward``,
    ``ctx.tensors``.
    """
    c, tokens = inputs.compute_bytes, inputs.step_tokens
    keeps_input = inputs.method in ("int8", "hqq") or (inputs.trainer.keeps_inputs and inputs.packed_4bit)
    for index, (width, layers, kept_anyway) in enumerate(input_tensors(inputs)):
        name = "attention" if index < 2 else "feed-forward"
        if inputs.kernels.selective and layers and layers[0].name in GATED_LAYERS:
            yield SavedTensor(name, inputs.wide_bytes * width * tokens if layers[0].name != GATED_LAYERS[-1] else 0)
            continue
        adapted = [linear for linear in layers if inputs.adapts(linear)]
        branches = len(adapted)
        if index == 0 and inputs.trainer.one_qkv_branch:
            branches = min(1, branches)
            if 0 < len(adapted) < len(layers):
                yield SavedTensor(name, c * sum(linear.out_features for linear in adapted) * tokens)
        private = inputs.dropout or (inputs.trainer.reduced_input_copies and inputs.adapter_bytes != c)
        if private:
            yield SavedTensor(name, c * width * tokens, branches)
            mask = 1 if inputs.device == "cuda" else inputs.adapter_bytes
            yield SavedTensor(name, mask * width * tokens if inputs.dropout else 0, branches)
        if not kept_anyway and (not inputs.rank or keeps_input or (branches > 0 and not private)):
            yield SavedTensor(name, c * width * tokens)
        yield SavedTensor(name, c * inputs.rank * tokens, branches)
    if inputs.routers:  # a trained router keeps its input, and its weights as rounded to the compute dtype
        a = inputs.architecture
        rounded = 0 if c == FLOAT else c * a.experts * a.hidden_size
        yield SavedTensor("feed-forward", c * a.hidden_size * tokens + rounded if a.experts else 0)


def int8_inputs(inputs: PlanInputs) -> float:
    """Returns bytes per layer that LLM.int8 keeps even where the layer is recomputed.

    They belong to the graph's nodes and not to the saved tensors that checkpointing drops.
    Source: bitsandbytes 0.50, ``MatMul8bitLt.forward``, ``ctx.tensors``.
    """
    if inputs.method != "int8" or inputs.trainer.reenters:
        return 0
    return inputs.compute_bytes * inputs.step_tokens * sum(tensor.width for tensor in input_tensors(inputs))


def quantized_inputs(inputs: PlanInputs) -> float:
    """Returns bytes per layer of inputs that 4-bit layers keep unnecessarily."""
    if not inputs.trainer.keeps_inputs or not inputs.packed_4bit:
        return 0
    return inputs.compute_bytes * inputs.step_tokens * sum(tensor.width for tensor in input_tensors(inputs))


def input_tensors(inputs: PlanInputs) -> list[InputTensor]:
    """Lists the tensors that linear layers read, in the order of the block."""
    a = inputs.architecture
    layers = linear_layers(a)
    output = next(linear for linear in layers if linear.role in ("o_proj", "out_proj"))
    down = next((linear for linear in layers if linear.role == "down_proj"), None)
    front = layers[: layers.index(output)]
    middle = [linear for linear in layers[layers.index(output) + 1 :] if linear is not down]
    tensors = [
        InputTensor(a.hidden_size, front, False),
        InputTensor(
            output.in_features,
            [output],
            a.mixer == "attention"
            and inputs.attention != "eager"
            and not a.attention_gate
            and not inputs.kernels.documents,
        ),
        InputTensor(a.hidden_size, middle, False),
    ]
    tensors += [InputTensor(down.in_features, [down], False)] if down else []
    experts = inputs.split_experts()
    if experts:
        tensors.append(InputTensor(a.hidden_size * a.active_experts, experts[:2], False))
        tensors.append(InputTensor(a.intermediate_size * a.active_experts, experts[2:], False))
    return tensors


def feed_forward(inputs: PlanInputs) -> Iterator[SavedTensor]:
    """Yields the gate before and after its activation, and up; of a plain block the activation's input.

    The outputs of a token's experts are kept too, for the gradient of their weights."""
    a = inputs.architecture
    yield SavedTensor("feed-forward", inputs.compute_bytes * a.active_experts * a.hidden_size * inputs.step_tokens)
    if inputs.kernels.selective and a.mlp == "gated":
        return
    size = inputs.wide_bytes * feed_forward_width(a) * inputs.step_tokens
    yield SavedTensor("feed-forward", size, 3 if a.mlp == "gated" else 1)


def feed_forward_width(architecture: ArchitectureConfig) -> int:
    """Returns the width that one token passes through inside the feed-forward block, all its experts together."""
    return architecture.intermediate_size * max(1, architecture.active_experts) + architecture.shared_size


def adapter_copies(inputs: PlanInputs) -> Iterator[SavedTensor]:
    """Yields autocast's and the fused layers' copies of A and B in the compute dtype, where theirs differs."""
    c = inputs.compute_bytes
    if inputs.kernels.fused or (inputs.trainer.reduced_input_copies and inputs.adapter_bytes != c):
        recomputed = GATED_LAYERS if inputs.kernels.selective else ()
        layers = [*linear_layers(inputs.architecture), *inputs.split_experts()]
        adapted = [linear for linear in layers if inputs.adapts(linear) and linear.name not in recomputed]
        shared = inputs.experts == "shared"
        sides = sum((linear.in_features + linear.out_features) * (1 if shared else linear.copies) for linear in adapted)
        yield SavedTensor("adapter copies", c * inputs.rank * sides)


def fused_tensors(inputs: PlanInputs) -> Iterator[SavedTensor]:
    """Yields what `finetune.kernels` keeps.

    A norm keeps its input and one value per token, or per head; a product keeps its input and ``x A'``; the gated
    activation keeps nothing, since the products before and after it keep what it needs. Attention in tiles keeps q, k
    and v as the product wrote them; torch's own also keeps q and k with their rotary embedding and each document's
    output; with a soft cap it keeps what eager attention does, of one document at a time. A and B are kept in the
    compute dtype.
    """
    a, c, tokens, kernels = inputs.architecture, inputs.compute_bytes, inputs.step_tokens, inputs.kernels
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    yield SavedTensor("norms", c * a.hidden_size * tokens, a.norms_per_layer)
    yield SavedTensor("norms", FLOAT * tokens, a.norms_per_layer)
    if a.qk_norm:
        yield SavedTensor("norms", c * (query + key) * tokens)
        yield SavedTensor("norms", FLOAT * (2 if a.wide_qk_norm else a.heads + a.kv_heads) * tokens)
    if a.softcap:  # what eager attention keeps, but of one document at a time; its keys and values are copies
        pairs = a.heads * inputs.tokens * tokens
        yield SavedTensor("scores", pairs * FLOAT)
        yield SavedTensor("scores", pairs * c, 2 if c != FLOAT else 1)
        yield SavedTensor("attention", c * query * tokens, 3)
    else:
        yield SavedTensor("attention", c * (query + 2 * key) * tokens)
        yield SavedTensor("attention", FLOAT * a.heads * tokens)
        if not kernels.tiles:
            yield SavedTensor("attention", c * query * tokens, 2)
            yield SavedTensor("attention", c * key * tokens)
    yield SavedTensor("attention", c * query * tokens)
    yield SavedTensor("attention", c * a.hidden_size * tokens)
    yield SavedTensor("feed-forward", c * a.hidden_size * tokens)
    recomputed = GATED_LAYERS if kernels.selective else ()
    branches = sum(inputs.adapts(linear) for linear in linear_layers(a) if linear.name not in recomputed)
    yield SavedTensor("attention", c * inputs.rank * tokens * branches)
    if not kernels.selective:
        yield SavedTensor("feed-forward", 2 * c * a.intermediate_size * tokens)
    yield from adapter_copies(inputs)
