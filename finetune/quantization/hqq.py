"""hqq: 1 to 8 bits with a scale and a zero point a group, found by half-quadratic splitting; no data are needed.

transformers 5.23 has no HQQ loader for a CPU, so layers are replaced after loading. Source: hqq 0.2.8.post1, core/quantize.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.quantization.config import QuantizationConfig
from finetune.quantization.skip_modules import is_kept
from finetune.quantization.stored import Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE = "hqq.safetensors"
AXIS = 1
"""Groups lie along the inputs. Source: README of hqq, which finds it best for its 4-bit kernels; 0 was worse here too."""


def quantize(model: Any, config: QuantizationConfig, *, dtype: str) -> None:
    """Replaces the linear layers of a dense model, one at a time.

    Raises:
        ModelError: Groups do not divide a layer.
    """
    from torch import nn

    layers = {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and not is_kept(name, config.keep)
    }
    uneven = sorted(
        {name.rpartition(".")[2] for name, layer in layers.items() if layer.weight.numel() % config.group_size}
    )
    if uneven:
        raise ModelError(
            f"quantization.group_size={config.group_size} does not divide the weights of {', '.join(uneven)}; choose one that does, or "
            f"quantization.keep=[{','.join(uneven)}]"
        )
    for name, layer in layers.items():
        model.set_submodule(name, _layer(layer, config, dtype=dtype, device=str(layer.weight.device)))


def _layer(layer: Any, config: QuantizationConfig, *, dtype: str, device: str) -> Any:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=config.bits, group_size=config.group_size, axis=AXIS)
    return HQQLinear(layer, settings, compute_dtype=getattr(torch, dtype), device=device)


def save(model: Any, folder: Path) -> None:
    """The quantized layers in hqq's own encoding; the rest is in the base."""
    from safetensors.torch import save_file

    from finetune.quantization.backends import quantized_layers

    state = {
        f"{name}.{key}": tensor
        for name, layer in quantized_layers(model).items()
        for key, tensor in layer.state_dict().items()
    }
    folder.mkdir()
    save_file({key: tensor.contiguous().cpu() for key, tensor in state.items()}, folder / FILE)


def restore(model: Any, config: QuantizationConfig, folder: Path, *, dtype: str) -> None:
    """Puts saved layers into a dense model."""
    from safetensors import safe_open

    with safe_open(folder / FILE, "pt") as file:
        states: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118  # no dict
            name, _, part = key.rpartition(".")
            states.setdefault(name, {})[part] = file.get_tensor(key)
    for name, state in states.items():
        made = _layer(None, config, dtype=dtype, device=str(model.get_submodule(name).weight.device))
        made.load_state_dict(state)
        model.set_submodule(name, made)


def dense(layer: Any) -> Tensor:
    """The weight, shape (outputs, inputs), as the layer multiplies by it."""
    weight: Tensor = layer.dequantize()
    return weight


def stored(layer: Any) -> Stored:
    meta = layer.meta
    constants = {name: meta[name] for name in ("scale", "zero")}
    facts = ",".join(str(meta[name]) for name in ("nbits", "group_size", "axis", "packing", "compute_dtype"))
    return Stored(shape=_shape(meta), codes=layer.W_q.data, constants=constants, facts=facts)


def _shape(meta: dict[str, Any]) -> torch.Size:
    import torch

    return torch.Size(meta["shape"])
