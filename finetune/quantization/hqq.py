"""hqq: 1 to 8 bits with a scale and a zero point per group, found by half-quadratic splitting; it needs no data.

transformers 5.23 cannot load HQQ on a CPU, so layers are replaced after loading. Source: hqq 0.2.8.post1,
core/quantize.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.quantization.config import PackedWeight, QuantizationConfig
from finetune.quantization.skip_modules import is_skipped

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

FILE = "hqq.safetensors"
AXIS = 1
"""Groups lie along the inputs. Source: hqq's README, which finds it best for its 4-bit kernels; 0 was worse here
too."""


def quantize(model: PreTrainedModel, config: QuantizationConfig, *, dtype: str) -> None:
    """Replaces the linear layers of a dense model, one at a time.

    Raises:
        ModelError: A layer's weights are not a multiple of the group size.
    """
    from torch import nn

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: layer for name, layer in linear.items() if not is_skipped(name, config.skip_modules)}
    uneven = {name.rpartition(".")[2] for name, layer in layers.items() if layer.weight.numel() % config.group_size}
    if uneven:
        raise ModelError(
            f"quantization.group_size={config.group_size} does not divide the weights of {', '.join(sorted(uneven))}; "
            f"choose one that does, or quantization.skip_modules=[{','.join(sorted(uneven))}]"
        )
    for name, layer in layers.items():
        model.set_submodule(name, _quantized_layer(layer, config, dtype=dtype, device=str(layer.weight.device)))


def _quantized_layer(layer: Any, config: QuantizationConfig, *, dtype: str, device: str) -> Any:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=config.bits, group_size=config.group_size, axis=AXIS)
    return HQQLinear(layer, settings, compute_dtype=getattr(torch, dtype), device=device)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes the quantized layers in hqq's own encoding; everything else is in the base."""
    from safetensors.torch import save_file

    from finetune.quantization.backends import quantized_layers

    state = {
        f"{name}.{key}": tensor.contiguous().cpu()
        for name, layer in quantized_layers(model).items()
        for key, tensor in layer.state_dict().items()
    }
    folder.mkdir()
    save_file(state, folder / FILE)


def restore(model: PreTrainedModel, config: QuantizationConfig, folder: Path, *, dtype: str) -> None:
    """Puts saved layers into a dense model."""
    from safetensors import safe_open

    with safe_open(folder / FILE, "pt") as file:
        states: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118  # not a dict
            name, _, part = key.rpartition(".")
            states.setdefault(name, {})[part] = file.get_tensor(key)
    for name, state in states.items():
        device = str(model.get_submodule(name).weight.device)
        layer = _quantized_layer(None, config, dtype=dtype, device=device)
        layer.load_state_dict(state)
        model.set_submodule(name, layer)


def dense(layer: Any) -> Tensor:
    """Returns the weight, shape (outputs, inputs), as the layer multiplies by it."""
    weight: Tensor = layer.dequantize()
    return weight


def layer_of(key: str) -> str:
    """Returns the name of the layer that a saved tensor belongs to."""
    return key.rpartition(".")[0]


def is_quantized(keys: list[str]) -> bool:
    """Returns whether the saved tensors of a layer are those of a quantized one: `save` writes no others."""
    return bool(keys)


def dense_from(
    parts: dict[str, Tensor], name: str, *, metadata: dict[str, str], config: QuantizationConfig, dtype: torch.dtype
) -> Tensor:
    """Returns what `dense` returns for the layer that these tensors were saved from; see `bnb.dense_from`."""
    layer = _quantized_layer(None, config, dtype=str(dtype).removeprefix("torch."), device=str(parts["W_q"].device))
    layer.load_state_dict(parts)
    return dense(layer)


def packed_weight(layer: Any) -> PackedWeight:
    """Returns the layer's codes and constants."""
    import torch

    meta = layer.meta
    constants = {name: meta[name] for name in ("scale", "zero")}
    layout = ",".join(str(meta[name]) for name in ("nbits", "group_size", "axis", "packing", "compute_dtype"))
    shape = torch.Size(meta["shape"])
    return PackedWeight(shape=shape, codes=layer.W_q.data, constants=constants, layout=layout)
