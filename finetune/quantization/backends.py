"""Finds the library that quantized a layer, and asks all libraries the same questions."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.hardware.backends import BACKENDS
from finetune.quantization import bnb, hqq, prequantized, torchao
from finetune.quantization.config import QAT, PackedWeight, QuantizationConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LIBRARIES: dict[str, Any] = {"bitsandbytes": bnb, "torchao": torchao, "hqq": hqq}


def check_installed(config: QuantizationConfig) -> None:
    """Checks that the method's library is installed.

    Raises:
        ModelError: It is not.
    """
    library = BACKENDS[config.method].library
    if library and importlib.util.find_spec(library) is None:
        raise ModelError(
            f"quantization.method={config.method} needs the package {library}; run: "
            f"pip install 'finetune-qlora[{library.replace('_', '-')}]'"
        )


def loader_arguments(config: QuantizationConfig, *, dtype: str) -> dict[str, Any]:
    """Returns keyword arguments for ``from_pretrained``; empty where the loader quantizes nothing.

    Args:
        config: The quantization group.
        dtype: Of the computation, e.g. ``bfloat16``.

    Raises:
        ModelError: The method's library is not installed.
    """
    check_installed(config)
    function = _library_function(config, "loader_arguments")
    arguments: dict[str, Any] = function(config, dtype=dtype) if function else {}
    return arguments


def quantize(model: PreTrainedModel, config: QuantizationConfig, *, dtype: str) -> None:
    """Quantizes a loaded dense model in place, where the library works that way."""
    function = _library_function(config, "quantize")
    if function:
        function(model, config, dtype=dtype)


def save(model: PreTrainedModel, config: QuantizationConfig, folder: Path, *, shard: str) -> None:
    """Writes the quantized model, in transformers' files or the library's own."""
    function = _library_function(config, "save")
    if function:
        function(model, folder)
    else:
        model.save_pretrained(folder, max_shard_size=shard)


def restore(
    base: Path, config: QuantizationConfig, folder: Path, *, dtype: str, load: Callable[[Path], PreTrainedModel]
) -> PreTrainedModel:
    """Loads what `save` wrote.

    Args:
        base: Folder of the dense base.
        config: The quantization group.
        folder: Folder of the saved model.
        dtype: Of the computation.
        load: Loads a folder with transformers.
    """
    function = _library_function(config, "restore")
    if not function:
        return load(folder)
    model = load(base)
    function(model, config, folder, dtype=dtype)
    return model


def _library_function(config: QuantizationConfig, name: str) -> Callable[..., Any] | None:
    """Returns the library's own function of that name; None where it has none."""
    library = _qat() if config.method == QAT else LIBRARIES.get(BACKENDS[config.method].library)
    return getattr(library, name, None)


def _qat() -> ModuleType:
    """Imports the module of ``quantization=qat``, which defines a layer and so imports torch."""
    return importlib.import_module("finetune.quantization.qat")


def backend_of(layer: Any) -> Any:
    """Returns the module of this package that knows the layer; None where it is not quantized."""
    kind = type(layer)
    if (kind.__module__, kind.__name__) == ("torch.nn.modules.linear", "Linear"):
        kind = type(layer.weight)  # torchao replaces the weight, not the layer
    if kind.__module__ == "finetune.quantization.packed_linear":
        return prequantized
    if kind.__module__ == "finetune.quantization.qat":
        return _qat()
    library = LIBRARIES.get(kind.__module__.partition(".")[0])
    if library is bnb and not (hasattr(layer.weight, "quant_state") or hasattr(layer.weight, "CB")):
        return None  # a layer of the library with a plain weight: only the plan makes these, to count bytes
    return library


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Returns the model's quantized layers by name."""
    return {name: module for name, module in model.named_modules() if backend_of(module)}


def dense(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a layer's weight as its forward pass uses it, shape (outputs, inputs), in its own dtype by default."""
    backend = backend_of(layer)
    weight: Tensor = backend.dense(layer) if backend else layer.weight.data
    return weight if dtype is None else weight.to(dtype)


def packed_weight(layer: Any) -> PackedWeight:
    """Returns the codes and constants of a quantized layer."""
    packed: PackedWeight = backend_of(layer).packed_weight(layer)
    return packed


def dense_parameters(model: nn.Module) -> int:
    """Counts the weights of the dense model, however they are packed. Tied weights count once."""
    layers = quantized_layers(model).values()
    packed = _packed_parameters(layers)
    unquantized = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in packed)
    return unquantized + sum(packed_weight(layer).shape.numel() for layer in layers)


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a model with a name that says how it is read. Tied weights come once."""
    layers = quantized_layers(model)
    packed = _packed_parameters(layers.values())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in packed:
            yield name, tensor.data
    for name, layer in layers.items():
        weight = packed_weight(layer)
        for key, tensor in {"codes": weight.codes, **weight.constants, **weight.books}.items():
            yield f"{name}.{key}[{weight.layout}]", tensor


def _packed_parameters(layers: Iterable[Any]) -> set[int]:
    """Returns the ids of the parameters and buffers that hold quantized layers' codes, and constants where they do."""
    layers = list(layers)
    codes = {id(getattr(layer, name)) for layer in layers for name in ("weight", "W_q") if hasattr(layer, name)}
    return codes | {id(part) for layer in layers if backend_of(layer) is prequantized for part in layer.buffers()}
