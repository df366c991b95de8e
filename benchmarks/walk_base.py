"""Makes a base model of a recipe's architecture on the disk: random weights, one module in memory at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.walk_tokenizer import SMALLEST_VOCABULARY, kind_of, make_tokenizer
from finetune.architecture import ArchitectureConfig
from finetune.console import log
from finetune.errors import ModelError
from finetune.parameters import parameters

if TYPE_CHECKING:
    import torch
    from torch import nn

    from finetune.config import RunConfig
    from finetune.merge.checkpoint import TensorHeader

SHARD_BYTES = 2 * 1024**3
"""A shard is full when the next module would make it larger; the hub's shards have about 5 GB."""

TINY_SPREAD = 0.2
"""Standard deviation of a tiny model's weights: with the usual 0.02, two narrow layers predict every token alike."""


def make_base(config: RunConfig, folder: Path, *, tiny: bool = False, seed: int = 0) -> int:
    """Makes weights, config and tokenizer of the recipe's base in the form that the hub has them.

    Args:
        config: A recipe; ``model.architecture`` has the dimensions.
        folder: To create.
        tiny: Whether to make two narrow layers of the same class instead of all layers at full width.
        seed: Of the weights.

    Returns:
        The number of parameters, tied ones once.

    Raises:
        ModelError: The recipe has no dimensions.
    """
    from finetune.plan.model_config import transformers_config

    architecture = config.model.architecture
    if architecture is None:
        raise ModelError("benchmarks.walk: the experiment's model option has no architecture, so no base can be made")
    kind = kind_of(config.model.name, architecture)
    architecture = shrunk(architecture) if tiny else architecture
    tokenizer = make_tokenizer(kind, model_max_length=architecture.max_positions)
    model_config = transformers_config(config, architecture)
    model_config.initializer_range = TINY_SPREAD if tiny else model_config.initializer_range
    model_config.bos_token_id, model_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    folder.mkdir(parents=True)
    count = write_weights(model_config, folder, seed=seed)
    if count != parameters(architecture):
        raise ModelError(
            f"benchmarks.walk: {count:,} weights were made and the plan counts {parameters(architecture):,}"
        )
    tokenizer.save_pretrained(folder)
    log("walk", f"a {architecture.family} of {architecture.layers} layers with {count:,} random weights in {folder}")
    return count


def shrunk(architecture: ArchitectureConfig) -> ArchitectureConfig:
    """Returns two narrow layers of the same class, with as many query heads to a key head as far as four allow.

    Widths are multiples of 64, the blocks of bitsandbytes. Where layers differ, there is one layer of each kind.
    """
    a, heads, head_dim = architecture, 4, 32
    kinds = "".join(dict.fromkeys(a.layer_pattern))
    return dataclasses.replace(
        a, hidden_size=128, intermediate_size=256, layers=2, heads=heads, head_dim=head_dim,
        kv_heads=max(1, heads * a.kv_heads // a.heads), vocab_size=SMALLEST_VOCABULARY, layer_pattern=kinds,
        full_head_dim=min(64, a.full_head_dim), full_kv_heads=min(1, a.full_kv_heads), experts=min(4, a.experts),
        active_experts=min(2, a.active_experts), shared_size=min(256, a.shared_size),
        linear_key_heads=min(2, a.linear_key_heads), linear_value_heads=min(4, a.linear_value_heads),
        linear_head_dim=min(32, a.linear_head_dim),
    )  # fmt: skip


def write_weights(model_config: Any, folder: Path, *, seed: int) -> int:
    """Writes config.json and bfloat16 shards, initialised by the class itself; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.merge.checkpoint import SINGLE, ShardWriter, TensorHeader, write_index

    torch.manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    shards = _divide(model)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    files: dict[str, list[TensorHeader]] = {}
    for name, modules in zip(names, shards, strict=True):
        files[name] = [
            TensorHeader(f"{prefix}.{key}", torch.bfloat16, tuple(tensor.shape))
            for prefix, module in modules
            for key, tensor in stored_tensors(module)
        ]
        with ShardWriter(folder / name, files[name]) as writer:
            for _, module in modules:
                module.to_empty(device="cpu", recurse=False)
                model._init_weights(module)
                for _, tensor in stored_tensors(module):
                    writer.write(tensor.detach().to(torch.bfloat16))
                module.to_empty(device="meta", recurse=False)
    write_index(folder, files)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return count


def stored_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns a module's own parameters, and its buffers that a checkpoint has too."""
    buffers = module.named_buffers(recurse=False)
    stored = [(name, buffer) for name, buffer in buffers if name not in module._non_persistent_buffers_set]
    return [*module.named_parameters(recurse=False), *stored]


def _divide(model: Any) -> list[list[tuple[str, nn.Module]]]:
    """Divides the modules that have weights of their own into shards, in order; tied weights come once."""
    shards: list[list[tuple[str, nn.Module]]] = [[]]
    size, seen = 0, set()
    for name, module in model.named_modules():
        own = [tensor for _, tensor in stored_tensors(module)]
        if not own or all(id(parameter) in seen for parameter in own):
            continue
        seen |= {id(parameter) for parameter in own}
        bytes_ = sum(parameter.nbytes for parameter in own)
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, module))
        size += bytes_
    return shards
