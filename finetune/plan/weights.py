"""Bytes that do not depend on the batch: weights, adapter, gradients, optimizer states."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from finetune.parameters import (
    Linear,
    embedding_parameters,
    expert_parameters,
    head_parameters,
    linear_layers,
    mixer_parameters,
    norm_parameters,
    parameters,
)
from finetune.plan.inputs import SEGMENT_BYTES, SMALL_BYTES, PlanInputs, block_bytes
from finetune.quantization.config import PREQUANTIZED, QAT
from finetune.quantization.skip_modules import is_skipped

BLOCK = 64
"""Weights that share one constant in bitsandbytes' 4-bit forms. Source: QLoRA paper, section 3; bitsandbytes'
default."""

HQQ_BYTES = {8: 1, 6: 1, 5: 1, 4: 1 / 2, 3: 4 / 10, 2: 1 / 4, 1: 1 / 8}
"""Bytes per weight: 5 and 6 bits take a byte, ten weights of 3 bits take four. Source: hqq 0.2.8, core/bitpack.py."""

DOUBLE_BLOCK = 256
"""Constants that share one second-level constant. Source: QLoRA paper, section 3."""

STATE_BLOCK = 256
"""Elements that share one constant in bitsandbytes' 8-bit optimizers. Source: bitsandbytes/optim/optimizer.py."""

SMALLEST_8BIT_ELEMENTS = 4096
"""Smaller tensors keep float32 states. Source: ``min_8bit_size`` of bitsandbytes' optimizers."""

FLOAT = 4

ROUNDING_BYTES = 16
"""Bytes per weight while ``qat`` rounds a sum: float32 copies and int32 codes. Source: bitsandbytes 0.50.2,
backends/default/ops.py (quantize_4bit)."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of the frozen model.

    Attributes:
        codes: Quantized (or dense) weights of the block's linear layers, and of experts in 4 bits.
        constants: Their quantization constants; never sharded.
        unquantized: Embedding, head, norms, biases, routers; experts unless they are in 4 bits.
        ends: Embedding and head alone.
        unused: The unused rest of the GPU memory segments that hold ``codes``.
    """

    codes: float
    constants: float
    unquantized: float
    ends: float
    unused: float = 0

    @property
    def total(self) -> float:
        """Returns the sum of all parts."""
        return self.codes + self.constants + self.unquantized + self.unused


def weight_bytes(inputs: PlanInputs) -> Weights:
    """Computes the frozen model in memory."""
    a = inputs.architecture
    inside = quantized_linear(inputs)
    quantized = sum(linear.weights for linear in inside)
    kept = sum(linear.weights for linear in linear_layers(a)) + expert_parameters(a) - quantized
    rows = sum(linear.out_features * linear.count for linear in inside)
    head = head_parameters(a) or (embedding_parameters(a) if inputs.trainer.unties else 0)
    if inputs.trainer.quantizes_head and inputs.method != "none":
        quantized, rows, head = quantized + head, rows + a.vocab_size, 0
    codes, constants = quantized_bytes(inputs, quantized, rows)
    wide = FLOAT if inputs.upcast == "all" else inputs.stored_bytes
    norms = norm_parameters(a) * (FLOAT if inputs.upcast != "none" else inputs.stored_bytes)
    biases = sum(linear.biases for linear in linear_layers(a))
    ends = (embedding_parameters(a) + head) * wide
    other = ends + (biases + kept + mixer_parameters(a)) * inputs.stored_bytes
    copy = parameters(a) * inputs.compute_bytes if inputs.cast_copy else 0
    unused = 0.0
    for linear in inside:
        elements = linear.in_features * linear.out_features * linear.copies  # the experts of a layer lie in one block
        size = quantized_bytes(inputs, elements, linear.out_features * linear.copies)[0]
        unused += len(linear.layers) * (block_bytes(size, inputs) - size)
    unquantized = norms + other + copy + inputs.keep_bytes
    return Weights(codes=codes, constants=constants, unquantized=unquantized, ends=ends, unused=unused)


def quantized_linear(inputs: PlanInputs) -> list[Linear]:
    """Returns linear layers, and experts in 4 bits, without those kept by name (``model.layers.3.mlp.down_proj``)."""

    def quantized(linear: Linear) -> tuple[int, ...]:
        names = {layer: f"model.layers.{layer}.{linear.parent}.{linear.name}" for layer in linear.layers}
        return tuple(layer for layer, name in names.items() if not is_skipped(name, inputs.keep))

    layers = [*linear_layers(inputs.architecture), *inputs.split_experts()]
    return [dataclasses.replace(linear, layers=quantized(linear)) for linear in layers] if inputs.keep else layers


def quantized_bytes(inputs: PlanInputs, elements: int, rows: int) -> tuple[float, float]:
    """Returns the bytes of codes and constants of weights in matrices with ``rows`` rows in total."""
    if inputs.method == "none":
        return elements * (FLOAT if inputs.upcast == "all" and inputs.rank else inputs.stored_bytes), 0
    if inputs.method == "int8":
        return elements, rows * FLOAT
    if inputs.method == "torchao_int8":
        return elements, rows * inputs.compute_bytes
    if inputs.method == PREQUANTIZED:
        groups = elements / inputs.group_size if inputs.group_size else rows
        return elements * inputs.bits / 8, groups * inputs.group_bytes
    if inputs.method == "hqq":
        return elements * HQQ_BYTES[inputs.bits], 2 * elements / inputs.group_size * inputs.compute_bytes
    constants = elements / BLOCK
    kept = elements * inputs.stored_bytes if inputs.method == QAT else 0  # next to the codes of the last rounding
    return kept + elements / 2, constants * (1 + FLOAT / DOUBLE_BLOCK) if inputs.double else constants * FLOAT


def unjoined_bytes(inputs: PlanInputs) -> float:
    """Returns what experts waste on a GPU until the loaded ones are joined: small tensors share segments of 2 MiB."""
    sizes = [(linear.in_features * linear.out_features / 2, linear.count) for linear in inputs.split_experts()]
    small = [(size, count) for size, count in sizes if inputs.device == "cuda" and size < SMALL_BYTES]
    return sum(count * (SEGMENT_BYTES / (SEGMENT_BYTES // size) - size) for size, count in small)


def dense_bytes(inputs: PlanInputs) -> int:
    """Returns the bytes of the model in 16 bit, as it is downloaded and as a merge writes it."""
    return 2 * parameters(inputs.architecture)


def trainable_parameters(inputs: PlanInputs) -> int:
    """Returns the elements of the adapter, or of the whole model without one."""
    if not inputs.rank:
        return parameters(inputs.architecture)
    return sum(size * count for size, count in trained_tensors(inputs))


def trained_tensors(inputs: PlanInputs) -> list[tuple[int, int]]:
    """Returns the elements of each trained tensor, and how many are of that kind: A and B, and those of routers."""
    a, adapted = inputs.architecture, inputs.adapted_layers()
    tensors = [
        (side * inputs.rank, layer.count) for layer in adapted for side in (layer.in_features, layer.out_features)
    ]
    if inputs.routers:
        mixtures = a.layers - a.dense_layers
        tensors += [(a.experts * a.hidden_size, mixtures), (a.experts, mixtures if a.expert_bias else 0)]
    return tensors


def element_bytes(inputs: PlanInputs) -> int:
    """Returns bytes per trained element."""
    return inputs.adapter_bytes if inputs.rank else inputs.stored_bytes


def adapter_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of LoRA's A and B; 0 for full fine-tuning, whose weights count as the model's."""
    return trainable_parameters(inputs) * inputs.adapter_bytes if inputs.rank else 0


def gradient_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of all gradients; each has its parameter's dtype."""
    trained = trainable_parameters(inputs) * element_bytes(inputs)
    embedding = embedding_parameters(inputs.architecture) * inputs.compute_bytes
    frozen = embedding if inputs.trainer.embedding_gradient else 0
    return trained + frozen


def optimizer_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of the states. torch's AdamW keeps them in the parameter's dtype, bitsandbytes in its own."""
    count = trainable_parameters(inputs)
    name = inputs.optimizer.removeprefix("paged_")
    states = 1 if name.startswith("lion") else 2
    if name == "sgd":
        return 0
    if name.endswith("_8bit"):
        small = _small_elements(inputs)
        return states * ((count - small) * (1 + FLOAT / STATE_BLOCK) + small * FLOAT)
    if name.endswith("_32bit"):
        return states * count * FLOAT
    return states * count * element_bytes(inputs)


def optimizer_peak_bytes(inputs: PlanInputs) -> float:
    """Returns what an optimizer step also needs: torch's foreach AdamW creates one temporary of every parameter's size.

    Source: torch/optim/adamw.py, ``_multi_tensor_adamw``, ``exp_avg_sq_sqrt``. Fused and bitsandbytes
    optimizers update in place.
    """
    if "bit" in inputs.optimizer or "fused" in inputs.optimizer:
        return 0
    return trainable_parameters(inputs) * element_bytes(inputs)


def _small_elements(inputs: PlanInputs) -> int:
    """Counts the elements of adapter matrices that are too small for 8-bit states."""
    if not inputs.rank:
        return 0
    return sum(size * count for size, count in trained_tensors(inputs) if size < SMALLEST_8BIT_ELEMENTS)


def stays_mapped(inputs: PlanInputs) -> bool:
    """Tells whether the base's file stays resident next to the concatenated weights of fused layers.

    The system frees its pages when it needs the memory. Source: safetensors maps its files.
    """
    return inputs.kernels.fused and inputs.method == "none" and inputs.device == "cpu"


def cached_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of copies: dense ones of cached quantized weights, or of a file that stays mapped on a CPU, and
    of the adapter that ``qat`` rounded its codes with."""
    if inputs.method == QAT:
        return adapter_bytes(inputs)
    if not inputs.kernels.cached and not stays_mapped(inputs):
        return 0
    return sum(linear.weights for linear in quantized_linear(inputs)) * inputs.compute_bytes


def workspace_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of the largest quantized matrix, dense, as each product or LLM.int8's backward pass needs it.

    Fused layers dequantize gate and up and concatenate them, so both exist twice. ``qat`` also sums and rounds it.
    """
    if inputs.method == "none" or inputs.kernels.cached:
        return 0
    a = inputs.architecture
    if inputs.kernels.fused:
        return 2 * 2 * a.hidden_size * a.intermediate_size * inputs.compute_bytes
    layers = [*linear_layers(a), *inputs.split_experts()]
    largest = max(linear.in_features * linear.out_features for linear in layers)
    if inputs.trainer.quantizes_head:
        largest = max(largest, embedding_parameters(a))
    return largest * (ROUNDING_BYTES if inputs.method == QAT else inputs.compute_bytes)
