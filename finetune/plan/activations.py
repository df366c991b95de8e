"""Bytes that the forward pass keeps for the backward pass, and what else is alive at the peak.

Counted by hand from what autograd saves in transformers' Llama block: an operation on a frozen weight keeps the
weight, not its input; element-wise products keep both factors; a cast keeps nothing. All sizes are per token of one
micro-batch unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.architecture import ArchitectureConfig, Linear, linear_layers
from finetune.plan.inputs import PlanInputs

FLOAT = 4
PARALLEL = ("phi", "falcon", "gpt_neox")
"""Families whose attention and feed-forward read the same residual, so both normalisations keep one copy of it."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch on one device.

    Attributes:
        stored: Kept from the forward pass until the backward pass comes by: all layers.
        layer: Alive besides while one layer is computed backwards.
        logits: Alive besides while the loss is computed backwards.
        logits_held: The part of ``logits`` that stays until the backward pass is done.
    """

    stored: float
    layer: float
    logits: float
    logits_held: float

    @property
    def peak(self) -> float:
        return self.stored + max(self.logits, self.layer + self.logits_held)


def activations(inputs: PlanInputs) -> Activations:
    """What one micro-batch of one process keeps and needs."""
    a, tokens = inputs.architecture, inputs.step_tokens
    layer = saved_in_layer(inputs)
    temporary = backward_temporaries(inputs)
    stream = FLOAT if inputs.upcast == "all" else inputs.compute_bytes
    boundary = stream * a.hidden_size
    last = (inputs.trainer.norm_bytes + inputs.compute_bytes) * a.hidden_size
    earlier = inputs.trainer.keeps_last_graph * kept_inputs(inputs)
    stored = a.layers * ((boundary if inputs.checkpointing else layer) + earlier) + last
    return Activations(
        stored=stored * tokens,
        layer=((layer if inputs.checkpointing else 0) + temporary) * tokens,
        logits=loss_bytes(inputs),
        logits_held=inputs.trainer.logits_held_bytes * a.vocab_size * tokens,
    )


def saved_in_layer(inputs: PlanInputs) -> float:
    """Bytes per token that one decoder layer keeps for its backward pass."""
    return norms(inputs) + attention(inputs) + linear_inputs(inputs) + feed_forward(inputs)


def norms(inputs: PlanInputs) -> float:
    """RMSNorm keeps its input in float32; LayerNorm, a single operation, keeps it as it is.

    A trained weight keeps the normalised value besides. Query and key norms work on the heads.
    """
    a = inputs.architecture
    count = 1 if a.family in PARALLEL else a.norms_per_layer
    each = inputs.compute_bytes if a.norm_bias else inputs.trainer.norm_bytes
    each += 0 if inputs.rank else inputs.compute_bytes
    heads = each * (a.heads + a.kv_heads) * a.head_dim if a.qk_norm else 0
    return count * each * a.hidden_size + heads


def attention(inputs: PlanInputs) -> float:
    """Query, key, value, output and the softmax.

    Fused kernels keep the log of the softmax's sum, one float32 a head. Eager attention keeps the scores of every
    pair of tokens twice: in float32 as the softmax made them, and cast for the product with the values; a soft cap
    keeps its tanh besides. Source: transformers 5.23, ``eager_attention_forward``.
    """
    a, c = inputs.architecture, inputs.compute_bytes
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    eager = inputs.attention == "eager"
    held_key = query if inputs.trainer.repeats_kv or eager else key
    held_value = query + 2 * key if inputs.trainer.keeps_qkv and held_key == key else held_key
    heads = c * (query + held_key + held_value)
    if not eager:
        return heads + c * query + FLOAT * a.heads
    pairs = a.heads * inputs.tokens
    return heads + pairs * (FLOAT + c + (c if a.softcap else 0))


def linear_inputs(inputs: PlanInputs) -> float:
    """Inputs of linear layers: kept for the gradient of A, and of the layer itself where it trains.

    Without dropout, layers that read the same tensor share it. With dropout, each branch keeps the dropped input and
    a mask of one byte. Where adapters are float32 under autocast, each branch keeps its own cast copy.
    """
    c = inputs.compute_bytes
    total = 0.0
    for index, (size, layers, kept_anyway) in enumerate(_sites(inputs)):
        adapted = [linear for linear in layers if inputs.adapts(linear)]
        branches = len(adapted)
        if index == 0 and inputs.trainer.one_qkv_branch:
            branches = min(1, branches)
            total += c * sum(linear.out_features for linear in adapted) if 0 < len(adapted) < len(layers) else 0
        base = not inputs.rank or (inputs.trainer.keeps_inputs and inputs.method in ("nf4", "fp4"))
        private = inputs.dropout or (inputs.trainer.reduced_input_copies and inputs.adapter_bytes != c)
        total += branches * (c + (1 if inputs.dropout else 0)) * size if private else 0
        shared = base or (branches > 0 and not private)
        total += c * size if shared and not kept_anyway else 0
        total += branches * inputs.rank * c
    return total


def kept_inputs(inputs: PlanInputs) -> float:
    """Bytes per token and layer that 4-bit layers hold on to although they need them not."""
    if not inputs.trainer.keeps_inputs or inputs.method not in ("nf4", "fp4"):
        return 0
    return inputs.compute_bytes * sum(size for size, _, _ in _sites(inputs))


def _sites(inputs: PlanInputs) -> list[tuple[int, list[Linear], bool]]:
    """The tensors that linear layers read: width, the layers that read it, and whether something else keeps it."""
    a = inputs.architecture
    layers = linear_layers(a)
    by_role = {linear.name: linear for linear in layers}
    output = next(linear for linear in layers if linear.name in ("o_proj", "dense"))
    down = next((by_role[name] for name in ("down_proj", "fc2", "dense_4h_to_h") if name in by_role), None)
    front = layers[: layers.index(output)]
    middle = [linear for linear in layers[layers.index(output) + 1 :] if linear is not down]
    sites = [(a.hidden_size, front, False), (output.in_features, [output], inputs.attention != "eager"), (a.hidden_size, middle, False)]
    return sites + ([(down.in_features, [down], False)] if down else [])


def feed_forward(inputs: PlanInputs) -> float:
    """Gated: the gate before and after its activation, and up. Plain: the activation's input. Times active experts."""
    a = inputs.architecture
    return inputs.compute_bytes * a.intermediate_size * (3 if a.mlp == "gated" else 1) * max(1, a.active_experts)


def backward_temporaries(inputs: PlanInputs) -> float:
    """Gradients alive at the widest point of a layer's backward pass: of the feed-forward's factors and the residual."""
    a = inputs.architecture
    wide = (3 if a.mlp == "gated" else 2) * a.intermediate_size * max(1, a.active_experts)
    scores = a.heads * inputs.tokens * 2 * FLOAT if inputs.attention == "eager" else 0
    return inputs.compute_bytes * (wide + 2 * a.hidden_size) + scores


def forward_bytes(inputs: PlanInputs, *, tokens: int) -> float:
    """A forward pass that keeps nothing for later: one layer's tensors, and a tile of float32 logits."""
    a = inputs.architecture
    tile = min(tokens, inputs.trainer.loss_tile[0]) * min(a.vocab_size, inputs.trainer.loss_tile[1])
    return tokens * (norms(inputs) + attention(inputs) + feed_forward(inputs)) + tile * FLOAT


def loss_bytes(inputs: PlanInputs) -> float:
    """Alive while the loss is computed backwards, for the whole micro-batch.

    A tiled loss holds one tile of logits and the float32 gradient of the last hidden state; torch's fallback, where
    there is no Triton, makes float32 copies of the tile: the shifted logits and their exponential.
    """
    a, tokens = inputs.architecture, inputs.step_tokens
    if inputs.trainer.logits_bytes:
        return inputs.trainer.logits_bytes * a.vocab_size * tokens
    tile_tokens, tile_entries = inputs.trainer.loss_tile
    tile = min(tokens, tile_tokens) * min(a.vocab_size, tile_entries)
    each = inputs.compute_bytes + (2 * FLOAT if inputs.device == "cpu" else 0)
    return tile * each + tokens * a.hidden_size * FLOAT


def largest_block_bytes(inputs: PlanInputs) -> float:
    """The largest single tensor of a step."""
    a, tokens = inputs.architecture, inputs.step_tokens
    if inputs.trainer.logits_bytes:
        return (FLOAT if inputs.trainer.logits_bytes > 2 * FLOAT else inputs.compute_bytes) * a.vocab_size * tokens
    return max(loss_bytes(inputs), FLOAT * a.hidden_size * tokens, inputs.compute_bytes * a.intermediate_size * tokens)


def kv_cache_bytes(architecture: ArchitectureConfig, *, rows: int, tokens: int, element_bytes: int) -> int:
    """Keys and values of every layer while generating."""
    a = architecture
    return 2 * a.layers * a.kv_heads * a.head_dim * rows * tokens * element_bytes
