"""Exports the merged model as a plain transformers folder, in its own dtype or another, in files of any size."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext
from finetune.export.manifest import write_record
from finetune.export.snippets import merged_snippet
from finetune.files import link_or_copy
from finetune.products import ExportResult
from finetune.run import write_json

if TYPE_CHECKING:
    from finetune.export.parity import Expected

SHARD_BYTES = 2 * 10**9
"""Largest file of converted weights: as much is in memory while one is written."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Links or converts the merged weights, adds the record, and checks the folder in plain transformers.

    Raises:
        ExportError: Weights or activations overflow the dtype, or the folder differs from the model.
    """
    from finetune.export.parity import rounding_cost
    from finetune.inference.adapted import free_memory

    dtype = settings.dtype or context.merged_dtype
    context.require_disk(name, context.merged_bytes * (2 if dtype == "float32" != context.merged_dtype else 1))
    source, target = context.merged.folder / "model", context.scratch / name
    dense = context.spec.dense(source, dtype=dtype)
    converted = dtype != context.merged_dtype
    wanted = merged = context.expected_merged_output(settings)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*WEIGHTS))
    if converted or settings.shard_bytes:
        _write_weights(source, target, name=name, dtype=dtype, shard_bytes=settings.shard_bytes or SHARD_BYTES)
        model = context.load(dataclasses.replace(dense, base=dataclasses.replace(dense.base, folder=target)), settings)
        wanted = context.expected_output(model, settings)
        _check_logits(wanted, name, dtype)
        del model
        free_memory()
    else:
        for file in (file for pattern in WEIGHTS for file in source.glob(pattern)):
            link_or_copy(file, target / file.name)
    write_record(target, "merged", spec=context.spec.dense(dtype=wanted.dtype), chat=context.chat)
    snippet = merged_snippet(name, model=context.spec.config, dtype=dtype)
    parity = context.check(name, settings, wanted, snippet=snippet, ends=[], packages=["transformers"])
    if converted:
        scratch, seed = context.scratch, context.scorer.seed
        cost = rounding_cost(name, merged=merged, export=wanted, config=settings, scratch=scratch, seed=seed)
        parity = dataclasses.replace(parity, cost=cost)
    context.snippets["The merged model, in plain transformers" + (f", in {dtype}" if converted else "")] = snippet
    return context.publish(name, settings, parity)


def _write_weights(source: Path, target: Path, *, name: str, dtype: str, shard_bytes: int) -> None:
    """Writes the weights in another dtype, or in smaller files, with one file's weights in memory at a time."""
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import safe_open
    from safetensors.torch import save_file

    files: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    wanted = getattr(torch, dtype)
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                files[key] = path
                sizes[key] = math.prod(file.get_slice(key).get_shape()) * wanted.itemsize
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for written, keys in split.filename_to_tensors.items():
        tensors = {}
        for key in keys:
            with safe_open(files[key], "pt") as file:
                tensor = file.get_tensor(key)
            tensors[key] = tensor.to(wanted) if tensor.is_floating_point() else tensor
            if not tensors[key].isfinite().all():
                raise ExportError(
                    f"export.{name}.dtype={dtype}: {key} holds weights beyond its range, which would be infinite; "
                    "use bfloat16"
                )
        save_file(tensors, target / written, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(target / "model.safetensors.index.json", index)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    write_json(target / "config.json", {**config, "dtype": dtype})


def _check_logits(wanted: Expected, name: str, dtype: str) -> None:
    import numpy

    if not all(numpy.isfinite(logits).all() for logits in wanted.logits):
        raise ExportError(
            f"export.{name}.dtype={dtype}: activations of this model overflow {dtype}, and its logits are not finite; "
            "use bfloat16"
        )
