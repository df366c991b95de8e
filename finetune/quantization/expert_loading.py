"""Loads a mixture with its experts as linear layers: those are quantized as they are read, one tensor at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import ModelError
from finetune.quantization.experts import (
    DOWN,
    FUSED,
    GATE,
    UP,
    fused_experts,
    halves,
    split_experts,
    split_modules,
)
from finetune.quantization.replaced import replaced

if TYPE_CHECKING:
    from torch import Tensor, nn

NAMES = {"w1": GATE, "w3": UP, "w2": DOWN, "gate_proj": GATE, "up_proj": UP, "down_proj": DOWN}
"""Layers of `Expert` by their names in checkpoints. Source: transformers 5.23, conversion_mapping.py."""


@contextmanager
def quantized_experts() -> Iterator[None]:
    """Makes transformers split the experts of 4-bit models that it loads while the context is open."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    key = "bitsandbytes_4bit"
    with replaced(AUTO_QUANTIZER_MAPPING, key, _splitting(AUTO_QUANTIZER_MAPPING[key])):
        yield


def _splitting(quantizer: Any) -> Any:
    """Returns a subclass of transformers' quantizer that also splits experts."""

    class SplittingQuantizer(quantizer):
        """Splits experts before bitsandbytes replaces linear layers, and reads their weights from the checkpoint."""

        def _process_model_before_weight_loading(self, model: Any, device_map: Any, **settings: Any) -> None:
            names = split_experts(model) if reads_checkpoints_of(model) else []
            if names:
                log("model", f"the experts of {len(names)} layers are quantized too, as linear layers")
            report_unquantized(model)
            super()._process_model_before_weight_loading(model, device_map, **settings)

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            if split_modules(model):
                rest = [conversion for conversion in weight_conversions if not _fuses(conversion)]
                weight_conversions = [*rest, *expert_conversions()]
            updated: list[Any] = super().update_weight_conversions(weight_conversions, model)
            return updated

        def _process_model_after_weight_loading(self, model: Any, **settings: Any) -> Any:
            if split_modules(model):
                check_loaded(model)
                model._weight_conversions = []  # a saved copy keeps the names of the layers
            return super()._process_model_after_weight_loading(model, **settings)

    return SplittingQuantizer


def reads_checkpoints_of(model: Any) -> bool:
    """Returns whether `expert_conversions` reads what transformers' own conversions of this class read."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist

    known = re.compile(rf"experts\.\*\.({'|'.join(NAMES)})\.weight$")
    conversions: list[Any] = [*filter(_fuses, get_model_conversion_mapping(model))]
    return all(
        all(isinstance(operation, (Concatenate, MergeModulelist)) for operation in conversion.operations)
        and all(known.search(source) for source in conversion.source_patterns)
        for conversion in conversions
    )


def _fuses(conversion: Any) -> bool:
    """Returns whether one of transformers' conversions makes the 3-D parameters of experts."""
    fused = re.compile(rf"experts\.({'|'.join(FUSED)})")
    return hasattr(conversion, "operations") and any(map(fused.search, conversion.target_patterns))


def report_unquantized(model: nn.Module) -> None:
    """Logs how much of a model is in experts that stay unquantized."""
    counts: Counter[str] = Counter()
    for _, experts in fused_experts(model):
        counts[type(experts).__name__] += sum(parameter.numel() for parameter in experts.parameters())
    for name, count in counts.items():
        log("model", f"experts of class {name} are computed by transformers alone: {count:,} weights stay unquantized")


def expert_conversions() -> list[Any]:
    """Returns conversions of a checkpoint's experts, one by one or fused, to the names of `SplitExperts`."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamed = [WeightRenaming(rf"(experts\.\d+)\.{name}\.", rf"\1.{layer}.") for name, layer in NAMES.items()]
    split = [
        WeightConverter(f"experts.{name}{ending}", f"experts.0.{first}.{part}", operations=[_split_operation()])
        for name, first in zip(FUSED, (GATE, DOWN), strict=True)
        for ending, part in (("", "weight"), ("_bias", "bias"))
    ]
    return [*renamed, *split]


def _split_operation() -> Any:
    from transformers.core_model_loading import ConversionOps

    class SplitFused(ConversionOps):
        """Splits a 3-D parameter into the weights of each expert's layers."""

        def convert(
            self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **settings: Any
        ) -> Any:
            (value,) = input_dict.values()
            fused = value[0] if isinstance(value, list) else value
            prefix, _, rest = settings["full_layer_name"].rpartition(".0.")
            experts = settings["model"].get_submodule(prefix)
            layer, _, part = rest.partition(".")
            return dict(_of_each_expert(fused, experts, prefix=prefix, layer=layer, part=part))

    return SplitFused()


def _of_each_expert(fused: Tensor, experts: Any, *, prefix: str, layer: str, part: str) -> Iterator[tuple[str, Tensor]]:
    for number, weight in enumerate(fused):
        if layer == DOWN:
            turned = weight.t() if experts.transposed and weight.dim() == 2 else weight
            yield f"{prefix}.{number}.{DOWN}.{part}", turned.contiguous()
            continue
        parts = halves(weight, transposed=experts.transposed, interleaved=experts.interleaved)
        for name, half in zip((GATE, UP), parts, strict=True):
            yield f"{prefix}.{number}.{name}.{part}", half.contiguous()


def check_loaded(model: nn.Module) -> None:
    """Checks that the checkpoint had every quantized layer of the experts.

    Raises:
        ModelError: Some are missing; transformers would go on with weights that mean nothing.
    """
    missing = [
        f"{name}.{key}"
        for name, experts in split_modules(model).items()
        for key, layer in experts.named_modules()
        if type(layer).__name__ == "Linear4bit" and getattr(layer.weight, "quant_state", None) is None
    ]
    if missing:
        raise ModelError(
            f"model.name: the checkpoint lacks {len(missing)} layers of experts, such as {missing[0]}; "
            "download it again"
        )
