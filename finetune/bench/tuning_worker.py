"""Measures a finished training of `finetune bench tuning`: ``python -m finetune.bench.tuning_worker``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.bench.task import Task, losses, scores
from finetune.inference.fresh_process import serve_request


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Reads and answers the held-out rows with exactly the model that was trained.

    Args:
        request: ``run`` (its folder), ``overrides``, ``metric``, ``max_new_tokens``, ``untuned`` (whether the base
            without its adapter is measured too).

    Returns:
        ``losses``, ``scores``, and ``untuned``, the base's losses or None.
    """
    import torch

    from finetune import hardware
    from finetune.config import load
    from finetune.inference.adapted import load_adapted_model
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
    return figures


if __name__ == "__main__":
    serve_request(measure)
