"""The tensors that one decoder layer keeps for its backward pass, each with its bytes.

Counted by hand from what autograd saves in transformers' Llama block and in `finetune.kernels`'s fused one: an operation on
a frozen weight keeps the weight, not its input; element-wise products keep both factors; a cast keeps nothing.
`finetune plan exact=true` counts the same on the real classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from finetune.architecture import Linear, linear_layers
from finetune.plan.inputs import FLOAT, PlanInputs

PARALLEL = ("phi", "falcon", "gpt_neox")
"""Families whose attention and feed-forward read the same residual, so both normalisations keep one copy of it."""


GATED_LAYERS = ("gate_proj", "up_proj", "down_proj")
"""What ``checkpointing=selective`` computes again: only its input is kept."""


class Kept(NamedTuple):
    """Tensors of one kind in one layer: what they are, the bytes of one for the whole micro-batch, how many."""

    name: str
    size: float
    times: float = 1


class Site(NamedTuple):
    """A tensor that linear layers read: its width, the layers, whether something else keeps it anyway."""

    width: int
    layers: list[Linear]
    kept_anyway: bool


def layer_tensors(inputs: PlanInputs) -> list[Kept]:
    """Everything that one layer keeps."""
    plain = (norms, attention, linear_inputs, feed_forward, adapter_copies)
    found = fused(inputs) if inputs.steps.fused else (kept for part in plain for kept in part(inputs))
    return [kept for kept in found if kept.size * kept.times > 0]


def layer_bytes(inputs: PlanInputs) -> float:
    """Their sum."""
    return sum(kept.size * kept.times for kept in layer_tensors(inputs))


def norms(inputs: PlanInputs) -> Iterator[Kept]:
    """RMSNorm keeps its input in float32; LayerNorm, a single operation, keeps it as it is.

    A trained weight keeps the normalised value besides. Query and key norms work on the heads.
    """
    a, tokens = inputs.architecture, inputs.step_tokens
    count = 1 if a.family in PARALLEL else a.norms_per_layer
    each = inputs.compute_bytes if a.norm_bias else inputs.trainer.norm_bytes
    yield Kept("norms", each * a.hidden_size * tokens, count)
    if not inputs.rank:
        yield Kept("norms", inputs.compute_bytes * a.hidden_size * tokens, count)
    if a.qk_norm:
        yield Kept("norms", each * a.heads * a.head_dim * tokens)
        yield Kept("norms", each * a.kv_heads * a.head_dim * tokens)


def attention(inputs: PlanInputs) -> Iterator[Kept]:
    """Query, key, value, output and the softmax.

    Fused kernels keep the log of the softmax's sum, one float32 a head, and the mask as numbers where documents share a
    row. Eager attention keeps the scores of every pair of tokens: in float32 as the softmax made them, and cast for the
    product with the values where that is in other numbers; a soft cap keeps its tanh besides.
    Source: transformers 5.23, ``eager_attention_forward`` and ``sdpa_attention_forward``; torch's ``convert_boolean_attn_mask``.
    """
    a, c, tokens = inputs.architecture, inputs.compute_bytes, inputs.step_tokens
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    eager, flat = inputs.attention == "eager", inputs.steps.flat
    held_key = query if inputs.trainer.repeats_kv or eager or flat else key
    held_value = query + 2 * key if (inputs.trainer.keeps_qkv or a.fused_qkv) and held_key == key else held_key
    for width in (query, held_key, held_value):
        yield Kept("attention", c * width * tokens)
    together = tokens if flat else inputs.tokens
    if not eager:
        yield Kept("attention", c * query * tokens)
        yield Kept("attention", FLOAT * a.heads * tokens)
        yield Kept("mask", c * together * tokens if flat else 0)
        return
    pairs = a.heads * together * tokens
    yield Kept("scores", pairs * FLOAT)
    yield Kept("scores", pairs * c if c != FLOAT else 0)
    yield Kept("scores", pairs * c if a.softcap else 0)


def linear_inputs(inputs: PlanInputs) -> Iterator[Kept]:
    """Inputs of linear layers: kept for the gradient of A, and of the layer itself where it trains.

    Without dropout, layers that read the same tensor share it. With dropout, each branch keeps the dropped input and
    a mask: of one byte on a GPU, in the adapter's numbers on a CPU. Where adapters are float32 under autocast, each branch
    keeps its own cast copy. LLM.int8 holds on to its input. Source: bitsandbytes 0.50, ``MatMul8bitLt.forward``, ``ctx.tensors``.
    """
    c, tokens = inputs.compute_bytes, inputs.step_tokens
    held = inputs.method in ("int8", "hqq") or (inputs.trainer.keeps_inputs and inputs.packed_4bit)
    for index, (width, layers, kept_anyway) in enumerate(sites(inputs)):
        name = "attention" if index < 2 else "feed-forward"
        if inputs.steps.selective and layers[0].name in GATED_LAYERS:
            yield Kept(name, inputs.wide_bytes * width * tokens if layers[0].name != GATED_LAYERS[-1] else 0)
            continue
        adapted = [linear for linear in layers if inputs.adapts(linear)]
        branches = len(adapted)
        if index == 0 and inputs.trainer.one_qkv_branch:
            branches = min(1, branches)
            if 0 < len(adapted) < len(layers):
                yield Kept(name, c * sum(linear.out_features for linear in adapted) * tokens)
        private = inputs.dropout or (inputs.trainer.reduced_input_copies and inputs.adapter_bytes != c)
        if private:
            yield Kept(name, c * width * tokens, branches)
            mask = 1 if inputs.device == "cuda" else inputs.adapter_bytes
            yield Kept(name, mask * width * tokens if inputs.dropout else 0, branches)
        if not kept_anyway and (not inputs.rank or held or (branches > 0 and not private)):
            yield Kept(name, c * width * tokens)
        yield Kept(name, c * inputs.rank * tokens, branches)


def held_inputs(inputs: PlanInputs) -> float:
    """Bytes per layer that LLM.int8 holds on to even where the layer is computed again: they hang on the graph's nodes, not
    among the saved tensors that checkpointing takes away. Source: bitsandbytes 0.50, ``MatMul8bitLt.forward``, ``ctx.tensors``."""
    if inputs.method != "int8" or inputs.trainer.reenters:
        return 0
    return inputs.compute_bytes * inputs.step_tokens * sum(site.width for site in sites(inputs))


def kept_inputs(inputs: PlanInputs) -> float:
    """Bytes per layer that 4-bit layers hold on to although they need them not."""
    if not inputs.trainer.keeps_inputs or not inputs.packed_4bit:
        return 0
    return inputs.compute_bytes * inputs.step_tokens * sum(site.width for site in sites(inputs))


def sites(inputs: PlanInputs) -> list[Site]:
    """The tensors that linear layers read, in the order of the block."""
    a = inputs.architecture
    layers = linear_layers(a)
    by_role = {linear.name: linear for linear in layers}
    output = next(linear for linear in layers if linear.name in ("o_proj", "dense"))
    down = next((by_role[name] for name in ("down_proj", "fc2", "dense_4h_to_h") if name in by_role), None)
    front = layers[: layers.index(output)]
    middle = [linear for linear in layers[layers.index(output) + 1 :] if linear is not down]
    found = [
        Site(a.hidden_size, front, False),
        Site(output.in_features, [output], inputs.attention != "eager"),
        Site(a.hidden_size, middle, False),
    ]
    return found + ([Site(down.in_features, [down], False)] if down else [])


def feed_forward(inputs: PlanInputs) -> Iterator[Kept]:
    """Gated: the gate before and after its activation, and up. Plain: the activation's input. Times active experts."""
    a = inputs.architecture
    if inputs.steps.selective and a.mlp == "gated":
        return
    size = inputs.wide_bytes * a.intermediate_size * max(1, a.active_experts) * inputs.step_tokens
    yield Kept("feed-forward", size, 3 if a.mlp == "gated" else 1)


def adapter_copies(inputs: PlanInputs) -> Iterator[Kept]:
    """A and B in the numbers of the computation, where they are others: autocast's copies, and those of fused layers."""
    c = inputs.compute_bytes
    if inputs.steps.fused or (inputs.trainer.reduced_input_copies and inputs.adapter_bytes != c):
        again = GATED_LAYERS if inputs.steps.selective else ()
        own = [
            linear
            for linear in linear_layers(inputs.architecture)
            if inputs.adapts(linear) and linear.name not in again
        ]
        yield Kept("adapter copies", c * inputs.rank * sum(linear.in_features + linear.out_features for linear in own))


def fused(inputs: PlanInputs) -> Iterator[Kept]:
    """`finetune.kernels`: a norm keeps its input and one number a token; a product its input and ``x A'``; the gated step
    nothing, since the product before it and the one after keep what it needs.

    Attention in tiles keeps q, k and v as the product wrote them; torch's own keeps the turned q and k and each
    document's output besides. A and B are kept in the numbers of the computation.
    """
    a, c, tokens, steps = inputs.architecture, inputs.compute_bytes, inputs.step_tokens, inputs.steps
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    yield Kept("norms", c * a.hidden_size * tokens, 2)
    yield Kept("norms", FLOAT * tokens, 2)
    yield Kept("attention", c * (query + 2 * key) * tokens)
    yield Kept("attention", FLOAT * a.heads * tokens)
    if not steps.tiles:
        yield Kept("attention", c * query * tokens, 2)
        yield Kept("attention", c * key * tokens)
    yield Kept("attention", c * query * tokens)
    yield Kept("attention", c * a.hidden_size * tokens)
    yield Kept("feed-forward", c * a.hidden_size * tokens)
    again = GATED_LAYERS if steps.selective else ()
    branches = sum(inputs.adapts(linear) for linear in linear_layers(a) if linear.name not in again)
    yield Kept("attention", c * inputs.rank * tokens * branches)
    if not steps.selective:
        yield Kept("feed-forward", 2 * c * a.intermediate_size * tokens)
    yield from adapter_copies(inputs)
