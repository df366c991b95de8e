"""Checks what exports require, before the run begins and again when they are written."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config_json import from_config_json
from finetune.errors import ExportError, ModelError
from finetune.export.config import CALIBRATED, ExportConfig
from finetune.parameters import linear_layers
from finetune.quantization.autoround import shape_problem
from finetune.quantization.calibration import calibration_sequences

if TYPE_CHECKING:
    from finetune.lora import LoraConfig

EXTRAS = {"gguf": "gguf", "gguf_lora": "gguf", "onnx": "onnx", "gptq": "auto-round", "awq": "auto-round"}
"""The pip extra of a format."""

PACKAGES = {"gguf": ("gguf", "xllamacpp"), "onnx": ("onnx", "onnxscript", "onnxruntime"), "auto-round": ("auto_round",)}
"""The packages of an extra."""

NO_EXPERTS = (
    "this format is written for linear layers, and experts are stacked weights that servers expect quantized too; "
    "export safetensors or gguf"
)

LOW_RANK_ONLY = (
    "llama.cpp adds nothing but low-rank products of linear layers: it supports no DoRA, embeddings, biases, tied "
    "heads or whole trained modules; merge it and export gguf_q8_0"
)


def check_packages(config: Mapping[str, ExportConfig]) -> None:
    """Checks that the packages of all exports are installed.

    Raises:
        ExportError: Packages of an export are missing.
    """
    needs = {name: missing_packages(settings.format) for name, settings in config.items()}
    if problems := [f"export.{name} {need}" for name, need in needs.items() if need]:
        raise ExportError("; ".join(problems))


def missing_packages(export_format: str) -> str:
    """Says what an export's format needs that is not installed, and the command that installs it; empty for nothing."""
    extra = EXTRAS.get(export_format, "")
    missing = [package for package in PACKAGES.get(extra, ()) if importlib.util.find_spec(package) is None]
    return f"needs {' and '.join(missing)}: pip install 'finetune-qlora[{extra}]'" if missing else ""


def check_packed(config: Mapping[str, ExportConfig], *, folder: Path) -> None:
    """Checks by the base's config.json that its layers can be quantized for servers.

    A base of a family whose dimensions are not known is checked when the export is written, before its rounding.

    Args:
        config: The exports.
        folder: Of the base's config.json.

    Raises:
        ExportError: It has experts, or layers that groups do not divide.
    """
    for name, settings in config.items():
        if settings.format not in (*CALIBRATED, "fp8"):
            continue
        group_size = settings.group_size if settings.format in CALIBRATED else None
        if problem := rounding_problem(folder, group_size=group_size, experts=NO_EXPERTS):
            raise ExportError(f"export.{name}: {problem}")


def rounding_problem(folder: Path, *, group_size: int | None, experts: str) -> str:
    """Explains by config.json why a model's layers cannot be rounded; empty where they can, or it is not known.

    Args:
        folder: Of the config.json.
        group_size: Inputs that share a scale; None for a format without groups.
        experts: What to say of a mixture.
    """
    try:
        architecture = from_config_json(folder)
    except ModelError:  # of a family whose dimensions are not known: checked when it is loaded
        return ""
    if architecture.experts:
        return experts
    if group_size is None:
        return ""
    shapes = [(layer.name, layer.out_features, layer.in_features) for layer in linear_layers(architecture)]
    return shape_problem(shapes, group_size=group_size)


def calibration_problems(config: Mapping[str, ExportConfig], *, folder: Path, seed: int) -> Iterator[str]:
    """Yields which exports the prepared training rows are too few or too short for.

    Args:
        config: The exports.
        folder: The prepared training rows.
        seed: Of the run.
    """
    for name, settings in config.items():
        if settings.format not in CALIBRATED:
            continue
        rows, tokens = settings.calibration_rows, settings.calibration_tokens
        calibration = calibration_sequences(folder, rows=rows, tokens=tokens, seed=seed)
        if calibration.shortage:
            yield f"export.{name}: {calibration.shortage}"


def check_gguf(config: Mapping[str, ExportConfig], *, family: str | None, folder: Path | None) -> None:
    """Checks that llama.cpp computes what the base computes, and knows its tokenizer.

    Args:
        config: The exports.
        family: ``model_type`` of the base where that is all that is known.
        folder: Of the base's config.json and tokenizer; None before they are fetched.

    Raises:
        ExportError: It does not.
    """
    name = next((name for name, settings in config.items() if EXTRAS.get(settings.format) == "gguf"), None)
    if name is None or importlib.util.find_spec("gguf") is None:
        return
    from finetune.export.gguf.architecture import Layout, check_family

    try:
        if folder is None:
            check_family(family, what="the base")
            return
        from transformers import AutoTokenizer

        from finetune.export.gguf.vocabulary import check_tokenizer

        Layout(folder)
        check_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except ExportError as error:
        raise ExportError(f"export={name}: {error}") from error


def without_card(name: str, formats: Iterable[str]) -> Iterator[str]:
    """Yields the problem of a push together with exports of these formats, if they include no card."""
    if "card" not in formats:
        yield (
            f"export.{name}: a push needs a card, so that others know what it is; "
            f"add card, e.g. export=[adapter,card,{name}]"
        )


def conflicts(config: Mapping[str, ExportConfig], *, lora: LoraConfig, rows: int, loss_rows: int) -> Iterator[str]:
    """Yields problems of exports with each other, with the adapter, and with the rows that the evaluation measures."""
    for name, settings in config.items():
        for key, wanted, measured in (("rows", settings.rows, rows), ("loss_rows", settings.loss_rows, loss_rows)):
            if wanted > measured:
                yield (
                    f"export.{name}.{key}={wanted} is more than eval.{key}={measured}, and an export is compared "
                    "with the model on rows that both were measured on; lower the one or raise the other"
                )
        if settings.format == "hub":
            yield from without_card(name, [export.format for export in config.values()])
        if settings.format == "gguf_lora" and (lora.variant == "dora" or lora.tokens):
            trained = "lora.variant=dora" if lora.variant == "dora" else f"lora.tokens={lora.tokens} trains embeddings"
            yield f"export.{name}: {trained}, and {LOW_RANK_ONLY}"
        if lora.adapts_experts and settings.format in ("gguf_lora", "bitsandbytes"):
            yield (
                f"export.{name} puts the adapter on the unquantized base, whose experts are not the linear layers that "
                f"lora.experts={lora.experts} adapts; export the merged model, e.g. export=[safetensors]"
            )
        if lora.routers and settings.format in ("gguf_lora", "bitsandbytes"):
            yield (
                f"export.{name} puts the adapter on the unquantized base, low-rank changes only, and lora.routers=true "
                "trains whole weights; export the merged model, e.g. export=[safetensors]"
            )
