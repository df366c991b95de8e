"""The merged model as a plain transformers folder, in its own numbers or in others, in files of any size."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.export.context import Work
from finetune.export.manifest import write_record
from finetune.export.snippets import merged_snippet

if TYPE_CHECKING:
    from finetune.export.parity import Expected

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def write(work: Work, name: str, settings: ExportConfig) -> dict[str, Any]:
    """Links or converts the merged weights, adds the record, and opens the folder by plain transformers.

    Raises:
        ExportError: Weights or activations beyond them, or the folder differs from the model.
    """
    from finetune.export.cost import cost
    from finetune.inference.adapted import free_memory

    numbers = settings.numbers or work.merged_dtype
    work.need(name, work.merged_bytes * (2 if numbers == "float32" != work.merged_dtype else 1))
    source, target = work.merged.folder / "model", work.desk / name
    dense = work.spec.dense(source, dtype=numbers)
    converted = numbers != work.merged_dtype
    wanted = merged = work.expect_merged(settings)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*WEIGHTS))
    if converted or settings.shard_bytes:
        model = dense.load()
        _check_finite(model, name, numbers)
        model.save_pretrained(target, max_shard_size=settings.shard_bytes or "5GB")
        wanted = work.expect(model, settings)
        _check_logits(wanted, name, numbers)
        del model
        free_memory()
    else:
        for file in (file for pattern in WEIGHTS for file in source.glob(pattern)):
            _link(file, target / file.name)
    write_record(target, "merged", spec=work.spec.dense(dtype=numbers), chat=work.chat)
    snippet = merged_snippet(name, model=work.spec.config, dtype=numbers)
    parity = work.check(name, settings, wanted, snippet=snippet, ends=[], packages=["transformers"])
    if converted:
        parity["cost"] = cost(name, merged=merged, export=wanted, config=settings, desk=work.desk, seed=work.judge.seed)
    work.snippets["The merged model, in plain transformers" + (f", in {numbers}" if converted else "")] = snippet
    return work.keep(name, settings, parity)


def _check_finite(model: Any, name: str, numbers: str) -> None:
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ExportError(
                f"export.{name}.numbers={numbers}: {key} holds weights beyond its range, which would be infinite; use bfloat16"
            )


def _check_logits(wanted: Expected, name: str, numbers: str) -> None:
    import numpy

    if not all(numpy.isfinite(logits).all() for logits in wanted.logits):
        raise ExportError(
            f"export.{name}.numbers={numbers}: between its layers this model's figures leave the range of {numbers}, and its logits are "
            "no numbers; use bfloat16"
        )


def _link(file: Path, target: Path) -> None:
    """Weights are linked, since they are large and never written to; everything else is a copy of its own."""
    try:
        os.link(file, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(file, target)
