"""Bytes per phase on one device, in host memory and on disk, while a run loads, trains, evaluates, saves and merges."""

from __future__ import annotations

import dataclasses

from finetune.inference.budget import WeightPlacement
from finetune.parameters import embedding_parameters, head_parameters, linear_layers
from finetune.plan import later, weights
from finetune.plan.activations import activations, largest_block_bytes, offloaded_bytes
from finetune.plan.activations_saved import layer_bytes
from finetune.plan.inputs import GIB, PlanInputs
from finetune.plan.later import AFTER_TRAINING
from finetune.quantization.config import PREQUANTIZED

CUDA_CONTEXT_BYTES = GIB // 2
"""CUDA context and loaded kernels of one process: 0.4 to 0.6 GiB with lazy loading, which torch uses.
Source: CUDA programming guide, lazy loading."""

USABLE_SHARE = 0.985
"""Share of a GPU's nominal memory that a process can allocate: torch reports 23.69 GiB on a 24 GiB RTX 3090 and 79.15
on an 80 GiB A100. Source: "total capacity" in torch's out-of-memory messages, which issue trackers quote."""

NCCL_BYTES = GIB // 4
"""Buffers of one communicator: 4 MiB for each of two directions of up to 32 channels. Source: NCCL docs,
NCCL_BUFFSIZE."""

CUBLAS_WORKSPACE_BYTES = 8519680
"""torch's cuBLAS workspace, ``:4096:2:16:8``. Source: torch docs, CUBLAS_WORKSPACE_CONFIG."""

PROCESS_BYTES = GIB // 2
"""A Python process with torch, transformers, peft, trl and datasets imported: resident size measured with torch 2.13 on
Linux."""

HOLES_PER_BLOCK = 0.5
"""Holes per block in the C library's heap: as tensors are allocated and freed, half as many stretches are unused as are
in use. Source: Knuth, The Art of Computer Programming, volume 1, section 2.5, the fifty-percent rule."""

FUSED_CHECKPOINTS = ("gpt_oss", "qwen3_5_moe_text")
"""Families whose checkpoints on the hub hold gate and up of all experts of a layer in one tensor."""

GATHERED_LAYERS = 2
"""FSDP gathers the current layer, and prefetches the next one. Source: torch docs, FSDP ``backward_prefetch``."""

Terms = dict[str, float]


def device_phases(inputs: PlanInputs, *, memory: int = 0, host: int = 0) -> dict[str, Terms]:
    """Returns bytes by term on one device for each phase, without terms that are 0.

    Args:
        inputs: The training configuration.
        memory: Of one device, which eval and merge adapt to; 0 where it is not known.
        host: Memory of the host.
    """
    resident = _resident(inputs)
    base = {name: resident[name] for name in ("weights", "constants", "unquantized", "gathered", "framework")}
    trained = base | {"adapter": resident["adapter"], "cached": resident["cached"]}
    states = {"optimizer": resident["optimizer"]}
    step = step_terms(inputs, resident) | {"allocator": allocator_bytes(inputs)}
    phases = {
        "load": _load(inputs, base),
        "first_step": {**trained, **step, "first weights": resident["adapter"] if inputs.device == "cpu" else 0},
        "step": {**trained, **states, **step},
        "sample": {**trained, **states, **later.sampling_terms(inputs)},
        "save": {**trained, **states},
        **{phase: _later(inputs, phase, memory=memory, host=host) for phase in AFTER_TRAINING},
    }
    if not inputs.sampled_rows:
        del phases["sample"]
    return {phase: {name: size for name, size in terms.items() if size > 0} for phase, terms in phases.items()}


def step_terms(inputs: PlanInputs, resident: Terms) -> Terms:
    """Returns what a training step adds at its peak: activations or, for many trained weights, the optimizer's step."""
    step = activations(inputs)
    gradients = resident["gradients"]
    workspace = weights.workspace_bytes(inputs) + (CUBLAS_WORKSPACE_BYTES if inputs.device == "cuda" else 0)
    earlier = gradients if inputs.accumulates else 0
    at_loss = step.logits > step.layer + step.logits_held
    live = step.peak + earlier + workspace
    update = weights.optimizer_peak_bytes(inputs) / inputs.rest_shards
    if gradients + update > live:
        return {"gradients": gradients, "workspace": update}
    return {
        "gradients": earlier,
        "activations": step.stored + (0 if at_loss else step.layer),
        "loss": step.logits if at_loss else step.logits_held,
        "workspace": workspace,
    }


def _resident(inputs: PlanInputs) -> Terms:
    """Returns bytes per device that stay allocated throughout training."""
    a, shards, rest = inputs.architecture, inputs.shards, inputs.rest_shards
    frozen = weights.weight_bytes(inputs)
    adapter, states = weights.adapter_bytes(inputs), weights.optimizer_bytes(inputs)
    gradients = weights.gradient_bytes(inputs)
    gathered = 0.0
    if shards > 1:
        gathered = GATHERED_LAYERS * (frozen.codes + (adapter if rest > 1 else 0)) / a.layers
        gathered += (embedding_parameters(a) + head_parameters(a)) * inputs.compute_bytes if rest > 1 else 0
    offload = inputs.offload
    offload_rest = offload and rest > 1
    if inputs.processes > 1 and rest == 1:
        gradients *= (
            2  # they are sent in one message, a second copy: finetune.launch.gradients, like the buckets of DDP
        )
    return {
        "weights": 0 if offload else (frozen.codes + frozen.unused) / shards,
        "constants": frozen.constants,
        "unquantized": (0 if offload else (frozen.unquantized - frozen.ends) / shards)
        + (0 if offload_rest else frozen.ends / rest),
        "gathered": gathered,
        "adapter": 0 if offload_rest else adapter / rest,
        "gradients": 0 if offload_rest else gradients / rest,
        "optimizer": 0 if offload_rest else states / rest,
        "framework": framework_bytes(inputs),
        "cached": weights.cached_bytes(inputs),
    }


def _load(inputs: PlanInputs, base: Terms) -> Terms:
    """Returns the terms while the base is loaded.

    ZeRO-3 shards a quantized base only after each device has all of it. Source: transformers issue 24395, bitsandbytes
    issue 1249. launch=fsdp quantizes it in host memory and moves one layer at a time to the device.
    """
    if inputs.shards == 1 or inputs.trainer.cuts_all:
        return base | {"workspace": largest_dense_bytes(inputs), "small segments": weights.unjoined_bytes(inputs)}
    if inputs.strategy == "fsdp":
        return base
    if inputs.method == "none":
        return base | {"workspace": largest_dense_bytes(inputs)}
    frozen = weights.weight_bytes(inputs)
    whole = {"weights": frozen.codes + frozen.unused, "unquantized": frozen.unquantized, "gathered": 0.0}
    return base | whole | {"workspace": largest_dense_bytes(inputs)}


def framework_bytes(inputs: PlanInputs) -> float:
    """Returns what a process takes before the first tensor."""
    if inputs.device == "cpu":
        return PROCESS_BYTES
    return CUDA_CONTEXT_BYTES + (NCCL_BYTES if inputs.processes > 1 else 0)


def allocator_bytes(inputs: PlanInputs) -> float:
    """Returns what the allocator reserves without use.

    torch's caching allocator on a GPU reserves space for one more of the largest tensor, since free stretches that
    smaller tensors have split cannot take it. Source: torch docs, CUDA memory management, fragmentation. The C library
    on a CPU leaves holes as large as a layer's temporary tensors between what each layer keeps.
    """
    if inputs.device == "cuda":
        return largest_block_bytes(inputs)
    whole = dataclasses.replace(inputs, kernels=dataclasses.replace(inputs.kernels, selective=False))
    return HOLES_PER_BLOCK * sum(group.architecture.layers * layer_bytes(group) for group in whole.by_group())


def largest_dense_bytes(inputs: PlanInputs) -> float:
    """Returns the largest tensor during loading: it arrives dense and is quantized on the device, if it is at all."""
    a = inputs.architecture
    linear = max(linear.in_features * linear.out_features for linear in linear_layers(a))
    if inputs.split_experts():
        together = 2 * a.experts if a.family in FUSED_CHECKPOINTS else 1
        linear = max(linear, together * a.hidden_size * a.intermediate_size)
    return (
        max(linear if inputs.method not in ("none", PREQUANTIZED) else 0, embedding_parameters(a))
        * inputs.compute_bytes
    )


def later_placement(inputs: PlanInputs, phase: str, *, memory: int, host: int) -> WeightPlacement | None:
    """Decides where the dense model of eval or merge lies; None where not even one row fits.

    Args:
        inputs: The training configuration.
        phase: ``eval`` or ``merge``.
        memory: Of one device; 0 where it is not known.
        host: Memory of the host.
    """
    share = USABLE_SHARE if inputs.device == "cuda" else 1.0
    free = max(1, round(memory * share - single_process_bytes(inputs))) if memory else 0
    return later.place(inputs, phase, free=free, host=host)


def _later(inputs: PlanInputs, phase: str, *, memory: int, host: int) -> Terms:
    placed = later_placement(inputs, phase, memory=memory, host=host)
    return {**later.terms(inputs, phase, placed), "framework": single_process_bytes(inputs)}


def single_process_bytes(inputs: PlanInputs) -> float:
    """Returns what one process takes before the first tensor, without communication buffers."""
    return PROCESS_BYTES if inputs.device == "cpu" else CUDA_CONTEXT_BYTES


def host_bytes(inputs: PlanInputs) -> dict[str, float]:
    """Returns host memory per phase for all processes of one machine; empty where the device is the CPU.

    The base's files are mapped, so what is read of them is also resident, once for all processes; the system frees
    those pages when it needs the memory. Source: safetensors; proc(5), RssFile.
    """
    if inputs.device == "cpu":
        return {}
    start = PROCESS_BYTES * inputs.processes
    frozen = weights.weight_bytes(inputs)
    rest = (
        frozen.ends + weights.adapter_bytes(inputs) + weights.gradient_bytes(inputs) + weights.optimizer_bytes(inputs)
    )
    parts = frozen.codes + frozen.unquantized - frozen.ends + (rest if inputs.rest_shards > 1 else 0)
    offloaded = (parts if inputs.offload else 0) + offloaded_bytes(inputs) * inputs.processes
    in_host = inputs.strategy == "fsdp" and not inputs.trainer.cuts_all  # each process loads a whole base
    saved = weights.adapter_bytes(inputs) + weights.optimizer_bytes(inputs)
    return {
        "load": start
        + largest_dense_bytes(inputs) * inputs.processes
        + (frozen.total * inputs.processes if in_host else offloaded),
        "step": start + offloaded,
        "save": start + offloaded + saved,
        "merge": start + weights.dense_bytes(inputs) / inputs.architecture.layers,
    }


def disk_bytes(inputs: PlanInputs, *, checkpoints: int) -> dict[str, float]:
    """Returns the disk space of a run: the base once, checkpoints, adapter, merged model."""
    adapter = weights.adapter_bytes(inputs)
    return {
        "base": float(weights.dense_bytes(inputs)),
        "checkpoints": checkpoints * (adapter + weights.optimizer_bytes(inputs)),
        "adapter": adapter,
        "merged": float(weights.dense_bytes(inputs)),
    }


def total(terms: Terms) -> float:
    """Sums the terms of a phase."""
    return sum(terms.values())


def peak(inputs: PlanInputs) -> float:
    """Returns the bytes on one device at the worst moment from loading to saving."""
    return max(total(terms) for phase, terms in device_phases(inputs).items() if phase not in AFTER_TRAINING)


def needed(inputs: PlanInputs) -> float:
    """Returns the bytes without which the run fails; a GPU's idle blocks do not count, since torch frees them.

    Source: torch docs, CUDA memory management, ``release_cached_blocks``.
    """
    return peak(inputs) - (allocator_bytes(inputs) if inputs.device == "cuda" else 0)


def step_peak(inputs: PlanInputs) -> float:
    """Returns the bytes on one device at the worst moment of training."""
    by_phase = device_phases(inputs)
    return max(total(by_phase["first_step"]), total(by_phase["step"]))
