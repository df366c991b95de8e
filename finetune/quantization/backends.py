"""Which library quantized a layer, and the questions that are put to all of them alike."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.hardware.backends import BACKENDS
from finetune.quantization import bnb, hqq, torchao
from finetune.quantization.config import QuantizationConfig
from finetune.quantization.stored import Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LIBRARIES: dict[str, Any] = {"bitsandbytes": bnb, "torchao": torchao, "hqq": hqq}


def check_installed(config: QuantizationConfig) -> None:
    """
    Raises:
        ModelError: The method's library is not there.
    """
    library = BACKENDS[config.method].library
    if library and importlib.util.find_spec(library) is None:
        raise ModelError(
            f"quantization.method={config.method} needs the package {library}; run: pip install 'finetune[{library}]'"
        )


def loader_arguments(config: QuantizationConfig, *, dtype: str) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained``; empty where nothing is quantized on the way in.

    Args:
        config: The quantization group.
        dtype: The computation's numbers, e.g. ``bfloat16``.

    Raises:
        ModelError: The method's library is not installed.
    """
    check_installed(config)
    arguments = _does(config, "loader_arguments")
    found: dict[str, Any] = arguments(config, dtype=dtype) if arguments else {}
    return found


def quantize(model: Any, config: QuantizationConfig, *, dtype: str) -> None:
    """Quantizes what the loader left dense, where the library works on a loaded model."""
    replace = _does(config, "quantize")
    if replace:
        replace(model, config, dtype=dtype)


def save(model: PreTrainedModel, config: QuantizationConfig, folder: Path, *, shard: str) -> None:
    """Writes the quantized form, in transformers' files or the library's own."""
    write = _does(config, "save")
    if write:
        write(model, folder)
    else:
        model.save_pretrained(folder, max_shard_size=shard)


def restore(
    base: Path, config: QuantizationConfig, folder: Path, *, dtype: str, load: Callable[[Path], PreTrainedModel]
) -> PreTrainedModel:
    """Opens what `save` wrote.

    Args:
        base: Folder of the dense base.
        config: The quantization group.
        folder: The saved form's.
        dtype: The computation's numbers.
        load: Opens a folder with transformers.
    """
    put = _does(config, "restore")
    if not put:
        return load(folder)
    model = load(base)
    put(model, config, folder, dtype=dtype)
    return model


def _does(config: QuantizationConfig, what: str) -> Callable[..., Any] | None:
    """The library's own way of doing something, where it has one."""
    return getattr(LIBRARIES.get(BACKENDS[config.method].library), what, None)


def library_of(layer: Any) -> Any:
    """The module of this room that knows the layer; None for one that is not quantized."""
    kind = type(layer)
    if (kind.__module__, kind.__name__) == (
        "torch.nn.modules.linear",
        "Linear",
    ):  # torchao's have another kind of weight
        kind = type(layer.weight)
    library = LIBRARIES.get(kind.__module__.partition(".")[0])
    if library is bnb and not (hasattr(layer.weight, "quant_state") or hasattr(layer.weight, "CB")):
        return None  # plain weights in its layer: the plan's count of sizes
    return library


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The model's quantized layers by name."""
    return {name: module for name, module in model.named_modules() if library_of(module)}


def dense(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A layer's weight as its forward pass sees it, shape (outputs, inputs); in its own numbers where none are named."""
    library = library_of(layer)
    weight: Tensor = library.dense(layer) if library else layer.weight.data
    return weight if dtype is None else weight.to(dtype)


def stored(layer: Any) -> Stored:
    """What a quantized layer holds."""
    found: Stored = library_of(layer).stored(layer)
    return found


def dense_parameters(model: nn.Module) -> int:
    """Weights of the dense model, whatever they are packed into. Tied weights count once."""
    layers = quantized_layers(model).values()
    packed = _packed(layers)
    return sum(p.numel() for p in model.parameters() if id(p) not in packed) + sum(
        stored(layer).shape.numel() for layer in layers
    )


def holdings(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a model holds, by a name that says how it is read. Tied weights come once."""
    layers = quantized_layers(model)
    packed = _packed(layers.values())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in packed:
            yield name, tensor.data
    for name, layer in layers.items():
        found = stored(layer)
        for key, tensor in {"codes": found.codes, **found.constants, **found.books}.items():
            yield f"{name}.{key}[{found.facts}]", tensor


def _packed(layers: Iterable[Any]) -> set[int]:
    """Identities of the parameters that hold quantized layers' codes."""
    return {id(getattr(layer, name)) for layer in layers for name in ("weight", "W_q") if hasattr(layer, name)}
