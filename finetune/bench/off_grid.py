"""Moves a base's weights off a quantization grid without changing what it computes.

The quickstart's small model was dequantized from a 4-bit file: its weights lie on a grid of 32 columns, so methods with
groups of 32 look lossless on it and every comparison is biased. A scale on one side of a weight and its inverse on the
other leaves the function unchanged and moves the weights off the grid: the diagonal form of the invariance that
SmoothQuant (Xiao et al. 2023, section 4) and AWQ (Lin et al. 2024, section 3.2) use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cache import cache_folder
from finetune.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.model import Base

SPREAD = 0.15
"""Standard deviation of the natural logarithm of a scale: enough to break the grid, too little to widen a block's range
much."""

SEED = 17


def moved_off_the_grid(base: Base) -> Path:
    """Returns a copy of a Llama-shaped base in float32 that computes the same with other weights; the cache keeps it.

    Before each attention and MLP, channel i of the norm's gain is divided by s_i and column i of the weights that read
    it is multiplied by s_i; likewise between v and o (per channel of a key-value head) and between up and down.

    Raises:
        ModelError: The base is not built like Llama.
    """
    from safetensors.torch import load_file, save_file

    key = hashlib.sha256(f"{base.sha256} {SPREAD} {SEED}".encode()).hexdigest()[:24]
    folder = cache_folder("offgrid") / key
    if folder.is_dir():
        return folder
    settings = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    tensors = {
        name: tensor.float()
        for file in sorted(base.folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    if settings.get("model_type") != "llama" or "model.layers.0.self_attn.q_proj.weight" not in tensors:
        raise ModelError(
            f"bench quantization: {base.name} is not a Llama, and only those can be moved off a grid; use grid=as_it_is"
        )
    heads, keys = settings["num_attention_heads"], settings["num_key_value_heads"]
    for layer in range(settings["num_hidden_layers"]):
        rescale_layer(tensors, f"model.layers.{layer}.", seed=SEED + layer, heads=heads, keys=keys)
    work = folder.with_name(f".{key}.{os.getpid()}")
    shutil.copytree(base.folder, work, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    (work / "config.json").write_text(json.dumps({**settings, "dtype": "float32"}), encoding="utf-8")
    os.replace(work, folder)
    return folder


def in_half_precision(folder: Path, target: Path) -> Path:
    """Returns a base with its weights in 16 bits: a copy of one in float32, another one as it is."""
    import torch
    from safetensors.torch import load_file, save_file

    from finetune.model.spec import checkpoint_dtype

    if checkpoint_dtype(folder) != "float32":
        return folder
    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        half = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
        save_file(half, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}), encoding="utf-8")
    return target


def rescale_layer(tensors: dict[str, Tensor], prefix: str, *, seed: int, heads: int, keys: int) -> None:
    """Rescales one layer in place.

    Args:
        tensors: The model's, by name.
        prefix: Beginning of the layer's names.
        seed: Of its scales.
        heads, keys: Query heads, and key-value heads.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def scales(count: int) -> Tensor:
        return torch.exp(torch.randn(count, generator=generator) * SPREAD)

    def weight(name: str) -> Tensor:
        return tensors[f"{prefix}{name}.weight"]

    for norm, readers in (("input_layernorm", ("q", "k", "v")), ("post_attention_layernorm", ("gate", "up"))):
        scale = scales(len(weight(norm)))
        weight(norm).div_(scale)
        for name in readers:
            weight(f"{'self_attn' if norm == 'input_layernorm' else 'mlp'}.{name}_proj").mul_(scale)
    value, out = weight("self_attn.v_proj"), weight("self_attn.o_proj")
    scale = scales(len(value))
    value.mul_(scale[:, None])
    per_head = scale.view(keys, -1).repeat_interleave(heads // keys, dim=0)  # each query head reads its group's values
    out.div_(per_head.reshape(-1))
    up, down = weight("mlp.up_proj"), weight("mlp.down_proj")
    scale = scales(len(up))
    up.mul_(scale[:, None])
    down.div_(scale)
