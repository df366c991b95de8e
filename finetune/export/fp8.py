"""Exports the merged model in FP8 (E4M3) as compressed-tensors writes it: a scale per output row, no calibration.

Servers also quantize each token's activations, with scales that they compute while they run. The format and its
settings are those of llm-compressor's scheme FP8_DYNAMIC.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext
from finetune.export.packed import check, linear_layers
from finetune.products import ExportResult

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0
"""Largest value of E4M3."""


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Rounds the merged model's linear layers to FP8, and checks the checkpoint.

    Raises:
        ExportError: A weight is not finite, or the checkpoint differs by more than its bounds.
    """
    context.require_disk(name, context.merged_bytes)
    source, target = context.merged.folder / "model", context.scratch / name
    layers = linear_layers(context.spec.config, source, name=name)
    target.mkdir()
    round_checkpoint(source, target, layers, name=name)
    note = (
        f"{len(layers)} layers with a scale per row; a server also rounds activations to FP8, token by token, which "
        "this comparison does not"
    )
    return check(context, name, settings, notes=[note])


def round_checkpoint(source: Path, target: Path, layers: Container[str], *, name: str) -> None:
    """Writes weights and config.json of a copy in FP8.

    Args:
        source: Folder of the dense checkpoint.
        target: An existing folder.
        layers: Names of the linear layers to round.
        name: Of the export, for messages.

    Raises:
        ExportError: A weight is not finite.
    """
    from finetune.model.text_only import decoder_name
    from finetune.quantization.rewrite import rewrite_checkpoint

    def replace(key: str, tensor: Tensor) -> dict[str, Tensor]:
        if decoder_name(key).removesuffix(".weight") not in layers:
            return {key: tensor}
        if not tensor.isfinite().all():
            raise ExportError(f"export.{name}: {key} holds weights that are not finite; train again")
        codes, scales = quantize(tensor)
        return {key: codes, f"{key}_scale": scales}

    rewrite_checkpoint(source, target, replace, quantization_config=quantization_config())


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight to FP8.

    Args:
        weight: Shape (outputs, inputs).

    Returns:
        Codes (outputs, inputs) in float8_e4m3fn, and scales (outputs, 1) in the dtype of the weight.
    """
    import torch

    wide = weight.float()
    scales = (wide.abs().amax(1, keepdim=True) / LARGEST).to(weight.dtype)
    scales = scales.clamp(min=torch.finfo(weight.dtype).tiny)  # rows of zeros
    codes = (wide / scales.float()).clamp(-LARGEST, LARGEST)  # the scale was rounded, perhaps down
    return codes.to(torch.float8_e4m3fn), scales


def quantization_config() -> dict[str, Any]:
    """Returns what describes the format in config.json, for vLLM and transformers."""
    common = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    weights = {**common, "strategy": "channel", "dynamic": False, "observer": "minmax"}
    activations = {**common, "strategy": "token", "dynamic": True, "observer": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
