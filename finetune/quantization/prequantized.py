"""Bases that are stored quantized: transformers builds the model, and `PackedLinear` holds its packed layers.

with packed_layers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import ModelError
from finetune.quantization.checkpoint_format import CheckpointFormat
from finetune.quantization.config import PackedWeight
from finetune.quantization.packed_checkpoint import DTYPES, PackedTensor, packed_names, read_headers, required_format
from finetune.quantization.replaced import replaced

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def packed_layers(folder: Path | str) -> Iterator[None]:
    """Makes transformers load a folder's packed layers as `PackedLinear` while the context is open.

    A base that bitsandbytes stored is loaded by transformers alone.

    Raises:
        ModelError: As `required_format`.
    """
    from transformers.quantizers import auto

    stored = required_format(Path(folder))
    if stored.packing == "bitsandbytes":
        yield
        return
    config, quantizer = _classes(stored, Path(folder))
    with (
        replaced(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, stored.method, config),
        replaced(auto.AUTO_QUANTIZER_MAPPING, stored.method, quantizer),
    ):
        yield


def _classes(stored: CheckpointFormat, folder: Path) -> tuple[Any, Any]:
    """Returns a configuration and a quantizer for transformers, for one folder."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class PackedConfig(QuantizationConfigMixin):
        """Names the method; everything else is in `CheckpointFormat`."""

        def __init__(self, **_: Any) -> None:
            self.quant_method: Any = stored.method

    class PackedQuantizer(HfQuantizer):
        """Replaces linear layers before the weights are read."""

        is_trainable = True

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            replace_layers(model, stored, read_headers(folder))

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            self.remove_quantization_config(model)  # peft and TRL know other layers under these names
            finish(model)
            return model

    return PackedConfig, PackedQuantizer


def replace_layers(model: Any, stored: CheckpointFormat, headers: Mapping[str, PackedTensor]) -> None:
    """Replaces the layers that a checkpoint holds packed, in a model on the meta device.

    Raises:
        ModelError: A packed layer is not a linear layer of the model, its tensors are not what the config describes, or
            the checkpoint lacks a layer.
    """
    import torch
    from torch import nn

    from finetune.model.text_only import decoder_name
    from finetune.quantization.packed_linear import PackedLinear
    from finetune.quantization.unpack import problem

    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    packed, problems, elsewhere = packed_names(headers), [], []
    for key, parts in packed.items():
        name = key if key in linear else decoder_name(key)
        if name not in linear:
            elsewhere.append(key)
            continue
        layer = linear.pop(name)
        shape = (layer.out_features, layer.in_features)
        if reason := problem({part: tensor.shape for part, tensor in parts.items()}, stored, shape=shape):
            problems.append(f"{key} {reason}")
            continue
        if layer.bias is None and f"{key}.bias" in headers:
            _require_zero_bias(key, headers[f"{key}.bias"])
        tensors = {
            part: torch.empty(tensor.shape, dtype=getattr(torch, DTYPES[tensor.dtype]), device="meta")
            for part, tensor in parts.items()
        }
        model.set_submodule(
            name, PackedLinear(shape, stored, tensors, bias=layer.bias, compute_dtype=layer.weight.dtype)
        )
    _require_known(elsewhere, model)
    head = model.get_output_embeddings()
    names = {decoder_name(key) for key in headers} | set(headers)
    lacking = [name for name, layer in linear.items() if layer is not head and f"{name}.weight" not in names]
    problems += [f"{name} is missing" for name in lacking]
    if problems or not packed:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ModelError(
            f"model.name: the tensors are not what its config.json describes ({stored.title}): "
            f"{problems[0] if problems else 'no layer is quantized'}{more}; download the checkpoint again, or correct "
            "its quantization_config"
        )
    log("model", f"{len(packed) - len(elsewhere)} layers are read as they are stored: {stored.title}")
    if stored.activations:
        log("model", "their inputs stay in 16 bit here, where a server that follows the config quantizes them too")


def _require_zero_bias(key: str, tensor: PackedTensor) -> None:
    """Requires that a bias without a place in the model changes nothing: some packers write zeros."""
    from safetensors import safe_open

    with safe_open(tensor.file, "pt") as file:
        if file.get_tensor(f"{key}.bias").any():
            raise ModelError(f"model.name: {key} has a bias in the checkpoint and none in the model; use another base")


def _require_known(elsewhere: list[str], model: Any) -> None:
    """Refuses packed layers that the model does not have as linear layers; those of image towers are not loaded."""
    from finetune.model.text_only import decoder_name

    prefixes = {name.partition(".")[0] for name, _ in model.named_children()}
    unknown = [key for key in elsewhere if decoder_name(key).partition(".")[0] in prefixes and "visual" not in key]
    if unknown:
        kind = "experts" if any(".experts." in key for key in unknown) else "layers"
        raise ModelError(
            f"model.name: the checkpoint holds {len(unknown)} packed {kind} that {type(model).__name__} does not have "
            f"as linear layers, such as {unknown[0]}; use the unquantized base, with quantization=nf4_double"
        )


def finish(model: Any) -> None:
    """Prepares loaded layers for their products.

    Raises:
        ModelError: A layer's groups contradict its shape.
    """
    from finetune.quantization.packed_linear import PackedLinear

    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            try:
                module.drop_plain_order()
            except ValueError as error:
                raise ModelError(f"model.name: {name}: {error}; download the checkpoint again") from error


def set_compute_dtype(model: nn.Module, dtype: str) -> None:
    """Makes bitsandbytes' layers, whose config names a dtype, compute in that of the run."""
    import torch

    layers: list[Any] = [module for module in model.modules() if hasattr(module, "compute_type_is_set")]
    for layer in layers:
        layer.compute_dtype, layer.compute_type_is_set = getattr(torch, dtype), True


def dense(layer: Any) -> Tensor:
    """Returns the weight, shape (outputs, inputs), as the layer multiplies by it."""
    weight: Tensor = layer.dense()
    return weight


def packed_weight(layer: Any) -> PackedWeight:
    """Returns the layer's codes and constants."""
    import torch

    parts = layer.parts()
    codes = parts.pop(layer.codes_name)
    shape = torch.Size((layer.out_features, layer.in_features))
    return PackedWeight(shape=shape, codes=codes, constants=parts, layout=f"{layer.stored.title},{layer.compute_dtype}")
