"""Bytes that the forward pass keeps for the backward pass, and what else is alive at the peak."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from finetune.architecture import ArchitectureConfig
from finetune.plan.activations_saved import (
    adapter_copies,
    attention,
    feed_forward,
    held_inputs,
    kept_inputs,
    layer_bytes,
    layer_tensors,
    norms,
)
from finetune.plan.inputs import FLOAT, PlanInputs
from finetune.plan.segments import block_bytes
from finetune.plan.weights import workspace_bytes

SLIDING_FAMILIES = ("gemma2", "gemma3_text")
"""Every other layer of theirs looks back a few thousand tokens only, and so has a mask of its own."""

TRAINED_ROWS = 256
"""Positions whose logits are alive at one time. Source: finetune/kernels/steps.py, LOSS_ROWS."""

TILE_COPIES_BYTES = 7 * FLOAT + 1
"""For each entry of a tile of logits, what torch alone makes of it on the way back: in float32 the logits, scaled and divided by
the temperature, their log-probabilities, probabilities and gradient, what is added to it and a product on the way there, and
which entry is the target. A soft cap keeps its tanh besides. Source: TRL 1.16, kernels/chunked_logprob.py, ``_backward_tile``."""


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
    layer = sum(block_bytes(kept.size, inputs) * kept.times for kept in layer_tensors(inputs))
    boundary = block_bytes(inputs.stream_bytes * a.hidden_size * tokens, inputs)
    norm = inputs.stream_bytes if inputs.steps.fused or a.norm_bias else inputs.trainer.norm_bytes
    positions = 2 * a.head_dim * inputs.compute_bytes * tokens  # cosine and sine, once for all layers
    gradient = (
        inputs.compute_bytes * a.hidden_size * (whole_tiles(tokens) if inputs.steps.loss_on_trained_tokens else tokens)
    )
    last = norm * a.hidden_size * tokens + gradient + positions + mask_bytes(inputs)
    earlier = inputs.trainer.keeps_last_graph * kept_inputs(inputs)
    held = 0 if inputs.offload_activations else boundary
    return Activations(
        stored=a.layers * ((held + held_inputs(inputs) if inputs.checkpointing else layer) + earlier) + last,
        layer=(layer if inputs.checkpointing else recomputed_bytes(inputs)) + backward_temporaries(inputs),
        logits=loss_bytes(inputs) + (autocast_bytes(inputs) if inputs.checkpointing else 0),
        logits_held=inputs.trainer.logits_held_bytes * a.vocab_size * tokens,
    )


def whole_tiles(tokens: int) -> int:
    """Positions of the loss on trained tokens, filled up. Source: finetune/kernels/steps.py, ``token_losses``."""
    return -(-tokens // TRAINED_ROWS) * TRAINED_ROWS


def mask_bytes(inputs: PlanInputs) -> float:
    """Which token may look at which, once for all layers: truth values, or numbers where attention is eager.

    Layers that are computed again hold on to it, although fused attention never looks at it.
    """
    if not inputs.checkpointing or not inputs.steps.flat:
        return 0
    masks = 2 if inputs.architecture.family in SLIDING_FAMILIES else 1
    return masks * (inputs.compute_bytes if inputs.attention == "eager" else 1) * inputs.step_tokens**2


def autocast_bytes(inputs: PlanInputs) -> float:
    """Autocast's copies of all adapters live until the forward pass ends, also those of layers that are computed again."""
    return 0 if inputs.steps.fused else inputs.architecture.layers * sum(kept.size for kept in adapter_copies(inputs))


def offloaded_bytes(inputs: PlanInputs) -> float:
    """Kept inputs of layers that wait in host memory (``train.offload``)."""
    if not inputs.offload_activations or not inputs.checkpointing:
        return 0
    return inputs.architecture.layers * inputs.stream_bytes * inputs.architecture.hidden_size * inputs.step_tokens


def saved_in_layer(inputs: PlanInputs) -> float:
    """Bytes per token that one decoder layer keeps for its backward pass."""
    return layer_bytes(inputs) / inputs.step_tokens


def recomputed_bytes(inputs: PlanInputs) -> float:
    """What ``checkpointing=selective`` makes again in one layer at a time: the gated step's tensors."""
    if not inputs.steps.selective:
        return 0
    return layer_bytes(
        dataclasses.replace(inputs, steps=dataclasses.replace(inputs.steps, selective=False))
    ) - layer_bytes(inputs)


def backward_temporaries(inputs: PlanInputs) -> float:
    """Gradients alive at the widest point of a layer's backward pass: of the feed-forward's factors and the residual.

    Eager attention's scores may be wider; when their gradients are there, what the feed-forward kept is gone.

    The fused gated step in torch alone works in float32: gate and up, the gradient, the sigmoid, both results and both of
    them side by side. Source: finetune/kernels/plain.py, ``swiglu_backward``; compiled, it writes one result.
    """
    a, c, tokens = inputs.architecture, inputs.wide_bytes, inputs.step_tokens
    width = a.intermediate_size * max(1, a.active_experts)
    if inputs.steps.fused:
        gated = tokens * c * 4 * width if inputs.steps.native else tokens * (FLOAT * 8 + c * 2) * width
        product = tokens * c * 2 * width + workspace_bytes(inputs)
        return max(gated, product) - workspace_bytes(inputs) + tokens * c * 2 * a.hidden_size
    wide = tokens * c * ((3 if a.mlp == "gated" else 2) * width + 2 * a.hidden_size)
    if inputs.attention != "eager":
        return wide
    together = tokens if inputs.steps.flat else inputs.tokens
    gone = sum(kept.size * kept.times for kept in layer_tensors(inputs) if kept.name == "feed-forward")
    return max(wide, a.heads * together * 2 * FLOAT * tokens - gone)


def forward_bytes(inputs: PlanInputs, *, tokens: int) -> float:
    """A forward pass that keeps nothing for later: one layer's tensors, and a tile of float32 logits."""
    a = inputs.architecture
    tile = min(tokens, inputs.trainer.loss_tile[0]) * min(a.vocab_size, inputs.trainer.loss_tile[1])
    layer = sum(
        kept.size * kept.times
        for part in (norms, attention, feed_forward)
        for kept in part(inputs)
        if kept.name != "mask"
    )
    return tokens * layer / inputs.step_tokens + tile * FLOAT


def loss_bytes(inputs: PlanInputs) -> float:
    """Alive while the loss is computed backwards, for the whole micro-batch.

    On trained tokens: their hidden states twice and the gradient, in the numbers of the computation (all tokens are taken
    as trained), and the logits of some of them; in torch alone also two float32 copies. TRL's own tiled loss holds one
    tile of logits and the float32 gradient of the last hidden state; where there is no Triton, also `TILE_COPIES_BYTES`.
    """
    a, c, tokens = inputs.architecture, inputs.compute_bytes, inputs.step_tokens
    if inputs.trainer.logits_bytes:
        return inputs.trainer.logits_bytes * a.vocab_size * tokens
    if inputs.steps.loss_on_trained_tokens:
        tiles = 2 if tokens > TRAINED_ROWS else 1  # the next one is made before the last one goes
        copies = 0 if inputs.steps.native else FLOAT if c == FLOAT else 2 * FLOAT  # float32 logits need no cast
        each = max(tiles * c, c + copies)
        return TRAINED_ROWS * a.vocab_size * each + 3 * c * a.hidden_size * tokens
    tile_tokens, tile_entries = inputs.trainer.loss_tile
    tile = min(tokens, tile_tokens) * min(a.vocab_size, tile_entries)
    each = c + (TILE_COPIES_BYTES + FLOAT * a.softcap if inputs.device == "cpu" else 0)
    return tile * each + tokens * a.hidden_size * FLOAT


def largest_block_bytes(inputs: PlanInputs) -> float:
    """The largest single tensor of a step."""
    a, tokens = inputs.architecture, inputs.step_tokens
    if inputs.trainer.logits_bytes:
        return (FLOAT if inputs.trainer.logits_bytes > 2 * FLOAT else inputs.compute_bytes) * a.vocab_size * tokens
    largest = max(kept.size for kept in layer_tensors(inputs))
    tile = min(tokens, inputs.trainer.loss_tile[0]) * min(a.vocab_size, inputs.trainer.loss_tile[1])
    if inputs.steps.loss_on_trained_tokens:
        tile = TRAINED_ROWS * a.vocab_size
    return max(largest, tile * inputs.compute_bytes, FLOAT * a.hidden_size * tokens)


def kv_cache_bytes(architecture: ArchitectureConfig, *, rows: int, tokens: int, element_bytes: int) -> int:
    """Keys and values of every layer while generating."""
    a = architecture
    return 2 * a.layers * a.kv_heads * a.head_dim * rows * tokens * element_bytes
