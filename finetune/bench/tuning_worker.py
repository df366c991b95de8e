"""Measures a finished training of `finetune bench tuning`: ``python -m finetune.bench.tuning_worker``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.bench.task import Task, losses, scores
from finetune.inference.fresh_process import serve_request

if TYPE_CHECKING:
    from finetune.model import ModelSpec


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Reads and answers the held-out rows with exactly the model that was trained, and with its 4-bit export.

    Args:
        request: ``run`` (its folder), ``overrides``, ``metric``, ``max_new_tokens``, ``untuned`` (whether the base
            without its adapter is measured too).

    Returns:
        ``losses`` and ``scores``; the same of the export, ``rounded_losses`` and ``rounded_scores``; and ``untuned``,
        the base's losses or None.
    """
    import torch

    from finetune import hardware
    from finetune.config import load
    from finetune.inference.adapted import free_memory, load_adapted_model
    from finetune.inference.rows import read_rows
    from finetune.model import ModelSpec

    run, config = Path(request["run"]), load(request["overrides"])
    placement = hardware.place(hardware.probe(config.hardware), config)
    torch.set_num_threads(placement.threads)
    spec = ModelSpec.resolve(config, placement)
    model = load_adapted_model(spec, run / "train" / "adapter")
    task = Task(data=run / "data", metric=request["metric"], max_new_tokens=request["max_new_tokens"])
    rows = read_rows(task.data / "heldout")
    figures: dict[str, Any] = {
        "losses": losses(model, rows),
        "scores": scores(model, spec, task, rows),
        "untuned": None,
    }
    if request["untuned"]:
        with model.disable_adapter():
            figures["untuned"] = losses(model, rows)
    del model
    free_memory()
    rounded = load_rounded(spec, run, dtype=config.merge.dtype)
    return figures | {"rounded_losses": losses(rounded, rows), "rounded_scores": scores(rounded, spec, task, rows)}


def load_rounded(spec: ModelSpec, run: Path, *, dtype: str) -> Any:
    """Merges the adapter into the original base and loads the sum in NF4, as ``export=bitsandbytes`` writes it.

    Args:
        spec: The base as it was loaded for training.
        run: The run's folder; the merged model is written to it.
        dtype: ``merge.dtype``.
    """
    import torch

    from finetune.merge.adapter_deltas import as_trained, read_changes
    from finetune.merge.candidates import build
    from finetune.model.load import load_model

    written: torch.dtype = getattr(torch, dtype)
    changes = as_trained(read_changes(run / "train" / "adapter"), spec, dtype=written)
    build(spec.base.folder, changes, run / "merged", dtype=written)
    quantization = dataclasses.replace(spec.quantization, method="nf4", double=True)
    merged = dataclasses.replace(spec.dense(run / "merged", dtype=dtype), quantization=quantization)
    return load_model(merged, use_cache=False)


if __name__ == "__main__":
    serve_request(measure)
