"""Measures on the run's own training rows which layers benefit most from full precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, log
from finetune.errors import ModelError
from finetune.quantization.backends import dense, packed_weight, quantized_layers
from finetune.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from finetune.model import ModelSpec
    from finetune.products import PreparedData

MIB = 1024**2
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SkippedLayers:
    """The layers that were chosen for full precision.

    Attributes:
        folder: Of the stage.
        layers: Best first: ``{"layer", "cost", "bytes"}``; the cost is in nats per token, the bytes are what full
            precision takes beyond the quantized form.
        next_best: The same for the best layer that was not chosen; None where there is none.
        tokens: Tokens of the measurement.
    """

    folder: Path
    layers: list[dict[str, Any]]
    next_best: dict[str, Any] | None
    tokens: int

    def apply_to(self, config: QuantizationConfig) -> QuantizationConfig:
        """Returns the group with the chosen layers by name."""
        names = [entry["layer"] for entry in self.layers]
        return dataclasses.replace(config, skip_modules=[*config.skip_modules, *names], skip_modules_mib=0.0)


def choose_skip_modules(spec: ModelSpec, *, folder: Path, data: PreparedData) -> SkippedLayers:
    """Spends ``quantization.skip_modules_mib`` on the layers whose rounding costs most for their bytes.

    Args:
        spec: The base as it will be loaded for training.
        folder: Of the stage.
        data: Its training rows are in ``data.folder/train``.

    Raises:
        ModelError: The budget is smaller than the smallest layer, or the original weights are missing.
    """
    from finetune.inference.adapted import free_memory
    from finetune.lora import read_documents
    from finetune.lora.init import checkpoint_reader

    config = spec.quantization
    documents = read_documents(data.folder / "train", tokens=config.skip_modules_tokens)
    documents = [document for document in documents if len(document) > 1]
    loaded = dataclasses.replace(spec, quantization=dataclasses.replace(config, skip_modules_mib=0.0)).load()
    tokens = sum(len(document) - 1 for document in documents)
    read_original = checkpoint_reader(spec.base.folder, setting="quantization.skip_modules_mib")
    costs = rounding_costs(loaded, read_original, documents)
    candidates: list[dict[str, Any]] = [
        {"layer": name, "cost": costs[name] / tokens, "bytes": extra_bytes(layer, loaded.dtype.itemsize)}
        for name, layer in measured_layers(loaded).items()
    ]
    del loaded
    free_memory()
    layers, next_best = choose(candidates, budget=int(config.skip_modules_mib * MIB))
    if not layers:
        raise ModelError(
            f"quantization.skip_modules_mib={config.skip_modules_mib:g} is less than the smallest layer takes: "
            f"{human_bytes(min(entry['bytes'] for entry in candidates))} more in full precision"
        )
    more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    names = ", ".join(entry["layer"] for entry in layers[:SHOWN]) + more
    log(
        "quantization",
        f"{len(layers)} of {len(candidates)} layers stay in full precision and take "
        f"{human_bytes(sum(entry['bytes'] for entry in layers))} more: {names}; their rounding costs most for "
        f"its bytes on {tokens:,} training tokens",
    )
    return SkippedLayers(folder=folder, layers=layers, next_best=next_best, tokens=tokens)


def measured_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the quantized layers by name, without experts: the checkpoint has those under other names."""
    from finetune.quantization.experts import is_expert_layer

    return {name: layer for name, layer in quantized_layers(model).items() if not is_expert_layer(name)}


def choose(candidates: Sequence[dict[str, Any]], *, budget: int) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Returns the layers that a budget of bytes buys, highest cost per byte first, and the best one that it does
    not."""
    chosen, next_best = [], None
    for candidate in sorted(candidates, key=lambda entry: (-entry["cost"] / entry["bytes"], entry["layer"])):
        if candidate["bytes"] <= budget:
            chosen.append(candidate)
            budget -= candidate["bytes"]
        elif next_best is None:
            next_best = candidate
    return chosen, next_best


def extra_bytes(layer: Any, element_bytes: int) -> int:
    """Returns what full precision takes beyond the quantized form."""
    packed = packed_weight(layer)
    quantized = packed.codes.nbytes + sum(tensor.nbytes for tensor in packed.constants.values())
    return packed.shape.numel() * element_bytes - quantized


def rounding_costs(
    model: PreTrainedModel, original: Callable[[str], Tensor], documents: Iterable[Sequence[int]]
) -> dict[str, float]:
    """Returns what each layer's rounding adds to the KL divergence from the dense model, in nats over all tokens.

    With e the change of a layer's output at a token and g the gradient of the loss there, half the mean of (g e)^2 is
    the divergence to second order, with the Fisher information at the text's own tokens. One forward and one backward
    pass measure all layers. Source: Kullback-Leibler divergence to second order; empirical Fisher as in Kim et al.
    2023, SqueezeLLM, section 4.1.

    Args:
        model: The quantized base, without gradients.
        original: Returns a dense weight by its name in the model.
        documents: Token ids.
    """
    import torch

    layers = measured_layers(model)
    costs = dict.fromkeys(layers, 0.0)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rounded = dense(layer)
            rounding = rounded.float() - original(f"{name}.weight").to(rounded.device).float()
            error = inputs[0].detach() @ rounding.to(inputs[0].dtype).T

            def add_cost(gradient: Tensor) -> None:
                costs[name] += float((gradient.float() * error.float()).sum(-1).square().sum()) / 2

            output.register_hook(add_cost)

        return hook

    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    model.enable_input_require_grads()
    try:
        for document in documents:
            ids = torch.tensor([list(document)], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    finally:
        model.disable_input_require_grads()
        for hook in hooks:
            hook.remove()
    return costs
