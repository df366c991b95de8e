"""Which layers are worth their bytes in full precision, measured on the run's own training rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, log
from finetune.errors import ModelError
from finetune.quantization.backends import dense, quantized_layers, stored
from finetune.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.model import ModelSpec
    from finetune.products import PreparedData

MIB = 1024**2
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class KeptLayers:
    """What was chosen.

    Attributes:
        folder: The stage's.
        layers: In the order of their worth: ``{"layer", "cost", "bytes"}``; the cost is in nats a token, the bytes are what
            full precision takes beyond the quantized form.
        left: The same for the best one that was not kept; None where none is left.
        tokens: That measured it.
    """

    folder: Path
    layers: list[dict[str, Any]]
    left: dict[str, Any] | None
    tokens: int

    def applied(self, config: QuantizationConfig) -> QuantizationConfig:
        """The group with the chosen layers by name."""
        return dataclasses.replace(config, keep=[*config.keep, *[one["layer"] for one in self.layers]], keep_mib=0.0)


def choose_skip_modules(spec: ModelSpec, *, folder: Path, data: PreparedData) -> KeptLayers:
    """Spends ``quantization.keep_mib`` on the layers whose rounding costs most for their bytes.

    Args:
        spec: The base as it will be loaded for training.
        folder: The stage's.
        data: Its training rows are in ``data.folder/train``.

    Raises:
        ModelError: The budget buys no layer, or the original weights are not at hand.
    """
    from finetune.inference.adapted import free
    from finetune.lora import read_documents
    from finetune.lora.init import reader

    config = spec.quantization
    documents = [
        document for document in read_documents(data.folder / "train", tokens=config.keep_tokens) if len(document) > 1
    ]
    loaded = dataclasses.replace(spec, quantization=dataclasses.replace(config, keep_mib=0.0)).load()
    tokens = sum(len(document) - 1 for document in documents)
    costs = rounding_costs(loaded, reader(spec.base.folder, wish="quantization.keep_mib"), documents)
    found: list[dict[str, Any]] = [
        {"layer": name, "cost": costs[name] / tokens, "bytes": extra_bytes(layer, loaded.dtype.itemsize)}
        for name, layer in quantized_layers(loaded).items()
    ]
    del loaded
    free()
    layers, left = choose(found, budget=int(config.keep_mib * MIB))
    if not layers:
        cheapest = min(one["bytes"] for one in found)
        raise ModelError(
            f"quantization.keep_mib={config.keep_mib:g} buys no layer: the smallest takes {human_bytes(cheapest)} more in full precision"
        )
    names = ", ".join(one["layer"] for one in layers[:SHOWN]) + (
        f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    )
    log(
        "quantization",
        f"{len(layers)} of {len(found)} layers stay in full precision for {human_bytes(sum(one['bytes'] for one in layers))}: {names}; "
        f"their rounding costs most for its bytes on {tokens:,} training tokens",
    )
    return KeptLayers(folder=folder, layers=layers, left=left, tokens=tokens)


def choose(found: Sequence[dict[str, Any]], *, budget: int) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The layers that a budget of bytes buys, dearest rounding for its bytes first, and the best one that it does not."""
    kept, left = [], None
    for one in sorted(found, key=lambda one: (-one["cost"] / one["bytes"], one["layer"])):
        if one["bytes"] <= budget:
            kept.append(one)
            budget -= one["bytes"]
        elif left is None:
            left = one
    return kept, left


def extra_bytes(layer: Any, element_bytes: int) -> int:
    """What full precision takes beyond the quantized form."""
    found = stored(layer)
    return (
        found.shape.numel() * element_bytes
        - found.codes.nbytes
        - sum(tensor.nbytes for tensor in found.constants.values())
    )


def rounding_costs(
    model: Any, original: Callable[[str], Tensor], documents: Iterable[Sequence[int]]
) -> dict[str, float]:
    """What each layer's rounding adds to the divergence from the dense model, in nats over all tokens.

    With e the change of a layer's output at a token and g the loss's gradient there, half the mean of (g e)^2 is the
    divergence to second order, the Fisher information taken at the text's own tokens. One pass each way gives all layers.
    Source: Kullback-Leibler divergence to second order; empirical Fisher as in Kim et al. 2023, SqueezeLLM, section 4.1.

    Args:
        model: The quantized base, without gradients.
        original: A dense weight by its name in the model.
        documents: Token ids.
    """
    import torch

    costs = dict.fromkeys(quantized_layers(model), 0.0)

    def watch(name: str) -> Callable[..., None]:
        def seen(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rounded = dense(layer)
            lost = (rounded.float() - original(f"{name}.weight").to(rounded.device).float()).to(inputs[0].dtype)
            error = inputs[0].detach() @ lost.T

            def add(gradient: Tensor) -> None:
                costs[name] += float((gradient.float() * error.float()).sum(-1).square().sum()) / 2

            output.register_hook(add)

        return seen

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in quantized_layers(model).items()]
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
