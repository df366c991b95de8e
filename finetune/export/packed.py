"""Exports the merged model in 4 bits for servers, in the formats of GPTQ and AWQ, calibrated on the training rows.

Each is opened by this project's own decoder and compared with the merged model; vLLM reads it by its config.json.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING

from finetune.console import log
from finetune.errors import ExportError, ModelError
from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext
from finetune.export.manifest import write_record
from finetune.export.needs import NO_EXPERTS, check_packages
from finetune.export.snippets import packed_snippet
from finetune.inference.chat import save_tokenizer
from finetune.products import ExportResult
from finetune.quantization import QuantizationConfig
from finetune.quantization.autoround import Rounding, round_model, shape_problem
from finetune.quantization.calibration import calibration_sequences
from finetune.quantization.config import PREQUANTIZED

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from finetune.model import ModelConfig

TITLES = {"gptq": "4 bits in GPTQ's format", "awq": "4 bits in AWQ's format", "fp8": "FP8"}


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Rounds the merged model to 4 bits on the run's own training rows, and checks the checkpoint.

    Raises:
        ExportError: A package is missing, the rows are too few, groups do not divide a layer, or the checkpoint
            differs by more than its bounds.
    """
    check_packages({name: settings})
    layers = linear_layers(context.spec.config, context.merged.folder / "model", name=name)
    shapes = [(layer, module.out_features, module.in_features) for layer, module in layers.items()]
    if problem := shape_problem(shapes, group_size=settings.group_size):
        raise ExportError(f"export.{name}: {problem}")
    rows, tokens, seed = settings.calibration_rows, settings.calibration_tokens, context.scorer.seed
    calibration = calibration_sequences(context.data.folder / "train", rows=rows, tokens=tokens, seed=seed)
    if calibration.shortage:
        raise ExportError(f"export.{name}: {calibration.shortage}")
    context.require_disk(name, context.merged_bytes)
    placement, method = context.spec.placement, settings.format
    rounding = Rounding(method=method, group_size=settings.group_size, steps=settings.steps, seed=seed)
    log("export", f"{name}: rounding on {len(calibration.sequences)} sequences of {tokens} training tokens")
    try:
        made = round_model(
            context.merged.folder / "model",
            context.scratch / name,
            rounding,
            sequences=calibration.sequences,
            device=placement.device,
            dtype=context.spec.dense(context.merged.folder / "model").placement.dtype,
            threads=placement.threads,
            trust_remote_code=context.spec.config.trust_remote_code,
        )
    except ModelError as error:
        raise ExportError(f"export.{name}: {error}") from error
    how = f"{settings.steps} steps of SignRound a block" if method == "gptq" else "AWQ's scales, rounded to nearest"
    note = (
        f"{made.layers} layers in groups of {settings.group_size}: {how}, by auto-round {made.version} on "
        f"{len(calibration.sequences)} sequences of {tokens} training tokens (seed {seed}), in {made.seconds:.0f} s"
    )
    return check(context, name, settings, notes=[note])


def check(context: ExportContext, name: str, settings: ExportConfig, *, notes: list[str]) -> ExportResult:
    """Adds tokenizer and record to packed weights, compares them with the merged model and publishes them.

    Raises:
        ExportError: They cannot be opened, or differ by more than the bounds.
    """
    target = context.scratch / name
    shutil.copyfile(context.merged.folder / "model" / "generation_config.json", target / "generation_config.json")
    save_tokenizer(context.chat.tokenizer, target)
    dense = context.spec.dense(dtype=context.merged_dtype)
    spec = dataclasses.replace(dense, quantization=QuantizationConfig(method=PREQUANTIZED))
    write_record(target, "merged", spec=spec, chat=context.chat)
    snippet = packed_snippet(name, model=context.spec.config, dtype=context.merged_dtype)
    wanted, packages = context.expected_merged_output(settings), ["transformers", "torch"]
    parity = context.check(name, settings, wanted, snippet=snippet, ends=[], packages=packages)
    for note in notes:
        log("export", f"{name}: {note}")
    context.snippets[f"The merged model in {TITLES[settings.format]}, in transformers"] = snippet
    return context.publish(name, settings, parity, notes=notes)


def linear_layers(config: ModelConfig, folder: Path, *, name: str) -> dict[str, nn.Linear]:
    """Returns a model's linear layers without the head, by name and without contents.

    Args:
        config: The model group.
        folder: Of the checkpoint.
        name: Of the export.

    Raises:
        ExportError: The model has experts.
    """
    from torch import nn

    from finetune.compatibility import build_without_weights
    from finetune.quantization.experts import fused_experts

    model = build_without_weights(config, folder)
    if any(fused_experts(model)):
        raise ExportError(f"export.{name}: {NO_EXPERTS}")
    head = model.get_output_embeddings()
    return {
        layer: module for layer, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
