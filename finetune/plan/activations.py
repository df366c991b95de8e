"""Bytes that the forward pass keeps for the backward pass, and what else is alive at the peak."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from finetune.plan.activations_saved import (
    adapter_copies,
    feed_forward_width,
    int8_inputs,
    layer_bytes,
    layer_tensors,
    quantized_inputs,
)
from finetune.plan.inputs import FLOAT, PlanInputs, block_bytes
from finetune.plan.weights import workspace_bytes

TRAINED_ROWS = 256
"""Positions whose logits are alive at the same time. Source: finetune/kernels/autograd.py, LOSS_ROWS."""

TILE_COPIES_BYTES = 7 * FLOAT + 1
"""Bytes that plain torch creates for each entry of a tile of logits in the backward pass: in float32 the logits, scaled
and divided by the temperature, their log-probabilities, probabilities and gradient, a summand and a product of it, and
a flag for the target. A soft cap also keeps its tanh. Source: TRL 1.16, kernels/chunked_logprob.py,
``_backward_tile``."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch on one device.

    Attributes:
        stored: Kept from the forward pass to the backward pass, by all layers.
        layer: Also alive during one layer's backward pass.
        logits: Also alive during the loss's backward pass.
        logits_held: The part of ``logits`` that stays until the whole backward pass is done.
    """

    stored: float
    layer: float
    logits: float
    logits_held: float

    @property
    def peak(self) -> float:
        """Returns the bytes alive at the worst moment."""
        return self.stored + max(self.logits, self.layer + self.logits_held)


def activations(inputs: PlanInputs) -> Activations:
    """Computes what one micro-batch of one process keeps and needs."""
    a, tokens, groups = inputs.architecture, inputs.step_tokens, inputs.by_group()
    norm = inputs.stream_bytes if inputs.kernels.fused or a.norm_bias else inputs.trainer.norm_bytes
    positions = 2 * a.head_dim * inputs.compute_bytes * tokens  # cosine and sine, once for all layers
    positions_of_loss = whole_tiles(tokens) if inputs.kernels.loss_on_trained_tokens else tokens
    gradient = inputs.compute_bytes * a.hidden_size * positions_of_loss
    last = norm * a.hidden_size * tokens + gradient + positions + mask_bytes(inputs) + router_loss_bytes(inputs)
    return Activations(
        stored=sum(group.architecture.layers * stored_by_layer(group) for group in groups) + last,
        layer=max(needed_by_layer(group) for group in groups),
        logits=loss_bytes(inputs) + (autocast_bytes(inputs) if inputs.checkpointing else 0),
        logits_held=inputs.trainer.logits_held_bytes * a.vocab_size * tokens,
    )


def stored_by_layer(inputs: PlanInputs) -> float:
    """Returns the bytes that one of the layers, which are alike, keeps from the forward to the backward pass."""
    held = 0.0 if inputs.offload_activations else _boundary_bytes(inputs)
    kept = held + int8_inputs(inputs) if inputs.checkpointing else _layer_blocks(inputs)
    return kept + inputs.trainer.keeps_last_graph * quantized_inputs(inputs)


def needed_by_layer(inputs: PlanInputs) -> float:
    """Returns the further bytes that one of the layers, which are alike, needs in its backward pass."""
    again = _layer_blocks(inputs) if inputs.checkpointing else recomputed_bytes(inputs)
    return again + backward_temporaries(inputs)


def _layer_blocks(inputs: PlanInputs) -> float:
    return sum(block_bytes(tensor.size, inputs) * tensor.number for tensor in layer_tensors(inputs))


def _boundary_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of the hidden states between two layers."""
    return block_bytes(inputs.stream_bytes * inputs.architecture.hidden_size * inputs.step_tokens, inputs)


def whole_tiles(tokens: int) -> int:
    """Rounds positions of the loss on trained tokens up to whole tiles, as `finetune.kernels.autograd` does."""
    return -(-tokens // TRAINED_ROWS) * TRAINED_ROWS


def mask_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of the attention mask, once for all layers; eager attention has a floating-point one.

    Recomputed layers keep it, although fused attention never reads it. Attention by document has none.
    """
    if not inputs.checkpointing or not inputs.kernels.flat or inputs.kernels.documents:
        return 0
    masks = len(set(inputs.architecture.letters) & set("fs"))
    return masks * (inputs.compute_bytes if inputs.attention == "eager" else 1) * inputs.step_tokens**2


def router_loss_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of the probabilities of all routers, which their auxiliary loss keeps, recomputed or not.

    Source: transformers 5.23, ``load_balancing_loss_func``.
    """
    a = inputs.architecture
    return FLOAT * a.experts * inputs.step_tokens * (a.layers - a.dense_layers) if inputs.routers else 0


def autocast_bytes(inputs: PlanInputs) -> float:
    """Returns autocast's copies of all adapters, which live until the forward pass ends, also in recomputed layers."""
    if inputs.kernels.fused:
        return 0
    groups = inputs.by_group()
    return sum(group.architecture.layers * sum(tensor.size for tensor in adapter_copies(group)) for group in groups)


def offloaded_bytes(inputs: PlanInputs) -> float:
    """Returns the layers' kept inputs that host memory holds (``train.checkpointing=offloaded``)."""
    if not inputs.offload_activations:
        return 0
    return inputs.architecture.layers * inputs.stream_bytes * inputs.architecture.hidden_size * inputs.step_tokens


def saved_in_layer(inputs: PlanInputs) -> float:
    """Returns the bytes per token that the largest decoder layer keeps for its backward pass."""
    return max(layer_bytes(group) for group in inputs.by_group()) / inputs.step_tokens


def recomputed_bytes(inputs: PlanInputs) -> float:
    """Returns what ``checkpointing=selective`` recomputes in one layer at a time: the gated activation's tensors."""
    if not inputs.kernels.selective:
        return 0
    everything = dataclasses.replace(inputs, kernels=dataclasses.replace(inputs.kernels, selective=False))
    return layer_bytes(everything) - layer_bytes(inputs)


def backward_temporaries(inputs: PlanInputs) -> float:
    """Returns the gradients alive at the widest point of a layer's backward pass: feed-forward factors and residual.

    Eager attention's scores may be wider; by the time their gradients exist, what the feed-forward kept has been freed.

    Experts in 4 bits are computed one at a time, at worst with every token; the gradients of all experts' outputs and
    inputs exist meanwhile.

    The fused gated activation in plain torch works in float32 with gate and up, the gradient, the sigmoid, both
    results, and these concatenated. Source: finetune/kernels/plain.py, ``gated_backward``; compiled, one result.
    """
    a, c, tokens = inputs.architecture, inputs.wide_bytes, inputs.step_tokens
    width = feed_forward_width(a)
    if inputs.kernels.fused:
        casts = 0 if c == FLOAT else 3 * FLOAT  # gate, up and the gradient
        gated = tokens * width * (4 * c if inputs.kernels.native else casts + 5 * FLOAT + 2 * c)
        product = tokens * c * 2 * width + workspace_bytes(inputs)
        scores = a.heads * inputs.tokens**2 * 2 * FLOAT if a.softcap else 0  # of one document at a time
        return max(gated, product, scores) - workspace_bytes(inputs) + tokens * c * 2 * a.hidden_size
    freed = sum(tensor.bytes for tensor in layer_tensors(inputs) if tensor.name == "feed-forward")
    residual, dense = tokens * c * 2 * a.hidden_size, workspace_bytes(inputs)
    if inputs.split_experts():
        width = max(a.intermediate_size, a.shared_size)
        residual += tokens * c * 2 * a.active_experts * a.hidden_size
    wide: float = tokens * c * (3 if a.mlp == "gated" else 2) * width + residual
    if dense and not inputs.split_experts():
        # it is counted besides, but down_proj's is freed before the widest point, and the others come after it
        before = tokens * c * width + (dense / 2 if a.fused_gate_up else dense)
        after = tokens * c * 2 * width + dense - freed
        wide = max(wide, before + residual, after + residual) - dense
    if inputs.attention != "eager":
        return wide
    together = tokens if inputs.kernels.flat else inputs.tokens
    return max(wide, a.heads * together * 2 * (c if a.sinks else FLOAT) * tokens - freed)


def loss_bytes(inputs: PlanInputs) -> float:
    """Returns what is alive during the loss's backward pass, for the whole micro-batch.

    On trained tokens: their hidden states twice and the gradient, in the compute dtype (all tokens are assumed to be
    trained), and the logits of one tile; in plain torch also float32 copies of these. TRL's own tiled loss keeps one
    tile of logits and the float32 gradient of the last hidden state; without Triton also `TILE_COPIES_BYTES`.
    """
    a, c, tokens = inputs.architecture, inputs.compute_bytes, inputs.step_tokens
    if inputs.trainer.logits_bytes:
        return inputs.trainer.logits_bytes * a.vocab_size * tokens
    if inputs.kernels.loss_on_trained_tokens:
        tiles = 2 if tokens > TRAINED_ROWS else 1  # the next one is created before the last one is freed
        copies = 0 if inputs.kernels.native else FLOAT if c == FLOAT else 2 * FLOAT  # float32 logits need no cast
        each = max(tiles * c, c + copies) + c * a.softcap  # a cap keeps its tanh
        return TRAINED_ROWS * a.vocab_size * each + 3 * c * a.hidden_size * tokens
    tile_tokens, tile_entries = inputs.trainer.loss_tile
    tile = min(tokens, tile_tokens) * min(a.vocab_size, tile_entries)
    each = c + (TILE_COPIES_BYTES + FLOAT * a.softcap if inputs.device == "cpu" else 0)
    return tile * each + tokens * a.hidden_size * FLOAT


def largest_block_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of the largest single tensor of a step."""
    a, tokens = inputs.architecture, inputs.step_tokens
    if inputs.trainer.logits_bytes:
        return (FLOAT if inputs.trainer.logits_bytes > 2 * FLOAT else inputs.compute_bytes) * a.vocab_size * tokens
    largest = max(tensor.size for group in inputs.by_group() for tensor in layer_tensors(group))
    tile = min(tokens, inputs.trainer.loss_tile[0]) * min(a.vocab_size, inputs.trainer.loss_tile[1])
    if inputs.kernels.loss_on_trained_tokens:
        tile = TRAINED_ROWS * a.vocab_size
    return max(largest, tile * inputs.compute_bytes, FLOAT * a.hidden_size * tokens)
