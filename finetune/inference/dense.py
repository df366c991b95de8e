"""Loads models for evaluation: on their device, over all GPUs, or with some weights in host memory and on disk.

    placed = place(spec.dense(folder), workload)
    model = load_placed(spec.dense(folder), placed, title="eval", name="merged", scratch=work)

Weights that do not fit are read from the checkpoint's own files, layer by layer, for each forward pass. The results are
those of the model in memory, to the bit.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.architecture import ArchitectureConfig
from finetune.console import human_bytes, log
from finetune.inference.adapted import free_memory
from finetune.inference.budget import FreeMemory, InferenceCost, WeightPlacement, Workload, place_weights
from finetune.memory import free_bytes

if TYPE_CHECKING:
    import torch

    from finetune.model import ModelSpec


def place(spec: ModelSpec, workload: Workload) -> WeightPlacement:
    """Decides where a model's weights lie, by the memory that is free now.

    Quantized weights are spread over GPUs and never offloaded: training had them in its devices' memory too.

    Raises:
        HardwareError: One row does not fit, even without weights.
    """
    import torch
    from transformers import AutoConfig

    from finetune.model.load import cache_of

    free_memory()
    dtype = getattr(torch, spec.placement.dtype)
    config = AutoConfig.from_pretrained(spec.base.folder, trust_remote_code=spec.config.trust_remote_code)
    cost, free = cost_of(config, dtype=dtype), free_on(spec.placement.device)
    if not spec.is_quantized:
        size = stored_elements(spec.base.folder) * dtype.itemsize
        return place_weights(size, cost=cost, workload=workload, free=free)
    cache = cache_of(spec) if len(free.devices) > 1 else None
    folder = cache.folder if cache else spec.base.folder if spec.is_prequantized else None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0
    placed = place_weights(size, cost=cost, workload=workload, free=free)
    gpus = {place: limit for place, limit in placed.max_memory.items() if place != "cpu"}
    return dataclasses.replace(placed, max_memory=gpus)


def load_placed(spec: ModelSpec, placed: WeightPlacement, *, title: str, name: str, scratch: Path) -> Any:
    """Loads a dense model with its weights where they were placed.

    Args:
        spec: The dense model.
        placed: From `place`.
        title: Of the log line.
        name: What the model is, for the log line.
        scratch: Folder for weights that transformers rearranges while loading (experts), where these stay on disk.
    """
    if placed.max_memory:
        log(title, f"{name}: {describe(placed)}")
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it says the same in its own words
    return spec.load(max_memory=placed.max_memory, scratch=scratch)


def describe(placed: WeightPlacement) -> str:
    """Returns one sentence on weights that do not fit on the run's own device."""
    if not placed.offloaded_bytes:
        count = sum(isinstance(place, int) for place in placed.max_memory)
        return f"its weights do not fit on one GPU, and are spread over {count}"
    parts = [
        f"{human_bytes(size)} from {place}"
        for place, size in (("host memory", placed.host_bytes), ("disk", placed.disk_bytes))
        if size
    ]
    return (
        f"its weights do not fit in memory next to the {human_bytes(placed.working_bytes)} that a batch needs: "
        f"{' and '.join(parts)} are read again for each of {placed.passes:,} forward passes"
    )


def cost_of(config: Any, *, dtype: torch.dtype) -> InferenceCost:
    """Returns what inference with a model needs besides the weights, from transformers' config."""
    text: dict[str, Any] = config.get_text_config().to_dict()  # where layers differ, a config has no attribute for all
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    dimensions = ArchitectureConfig(
        family=text["model_type"],
        hidden_size=hidden,
        intermediate_size=text.get("intermediate_size") or 4 * hidden,
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        vocab_size=text["vocab_size"],
        tied_embeddings=False,
        max_positions=text.get("max_position_embeddings", 1),
        active_experts=text.get("num_experts_per_tok") or 0,
    )
    return InferenceCost.of(dimensions, element_bytes=dtype.itemsize)


def stored_elements(folder: Path) -> int:
    """Counts the weights in a folder's safetensors; tied ones are stored once."""
    from math import prod

    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118  # not a dict
    return count


def free_on(device: str) -> FreeMemory:
    """Returns the free memory of all GPUs that this process sees, or of the CPU."""
    if not device.startswith("cuda"):
        return FreeMemory(devices=(free_bytes("cpu"),))
    import torch

    devices = tuple(free_bytes(f"cuda:{index}") for index in range(torch.cuda.device_count()))
    return FreeMemory(devices=devices, host=free_bytes("cpu"))
