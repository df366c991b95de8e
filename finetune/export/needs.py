"""What an export needs, asked before the run begins and again where it is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from finetune.errors import ExportError
from finetune.export.config import ExportConfig

if TYPE_CHECKING:
    from finetune.lora import LoraConfig

EXTRAS = {"gguf": "gguf", "gguf_lora": "gguf", "onnx": "onnx"}
"""What pip installs for a format."""

PACKAGES = {"gguf": ("gguf", "xllamacpp"), "onnx": ("onnx", "onnxscript", "onnxruntime")}
"""What an extra brings."""

LOW_RANK_ONLY = (
    "llama.cpp adds nothing but low-rank products of linear layers: DoRA, embeddings, biases, tied heads and whole trained modules are not "
    "known there; merge it and export gguf_q8_0"
)


def check_packages(config: Mapping[str, ExportConfig]) -> None:
    """Refuses exports that this environment cannot write or open again.

    Raises:
        ExportError: Packages of an export are missing.
    """
    problems = []
    for name, settings in config.items():
        extra = EXTRAS.get(settings.format, "")
        missing = [package for package in PACKAGES.get(extra, ()) if importlib.util.find_spec(package) is None]
        if missing:
            problems.append(f"export.{name} needs {' and '.join(missing)}: pip install 'finetune[{extra}]'")
    if problems:
        raise ExportError("; ".join(problems))


def without_card(name: str, formats: Iterable[str]) -> Iterator[str]:
    """The problem of a push beside exports of these formats, if it has one."""
    if "card" not in formats:
        yield f"export.{name}: a push needs a card, so that others know what it is; add card, e.g. export=[adapter,card,{name}]"


def conflicts(config: Mapping[str, ExportConfig], *, lora: LoraConfig, rows: int, loss_rows: int) -> Iterator[str]:
    """Problems of exports with each other, with the adapter, and with the rows that the evaluation measures."""
    for name, settings in config.items():
        for key, asked, measured in (("rows", settings.rows, rows), ("loss_rows", settings.loss_rows, loss_rows)):
            if asked > measured:
                yield (
                    f"export.{name}.{key}={asked} is more than eval.{key}={measured}, and an export is held beside the model on rows "
                    "that both were measured on; lower the one or raise the other"
                )
        if settings.format == "hub":
            yield from without_card(name, [one.format for one in config.values()])
        if settings.format == "gguf_lora" and (lora.variant == "dora" or lora.tokens):
            trained = "lora.variant=dora" if lora.variant == "dora" else f"lora.tokens={lora.tokens} trains embeddings"
            yield f"export.{name}: {trained}, and {LOW_RANK_ONLY}"
