"""A finished training of the lab's, measured in a process of its own: ``python -m finetune.bench.lab.tuned``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.bench.lab.task import Task, losses, scores
from finetune.inference.fresh_process import answer


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The held-out rows, read and answered by the very graph that was trained.

    Args:
        request: ``run`` (its folder), ``overrides``, ``metric``, ``max_new_tokens``, ``untuned`` (whether the base without its
            adapter is measured too).

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
    graph = load_adapted_model(spec, run / "train" / "adapter")
    task = Task(data=run / "data", metric=request["metric"], max_new_tokens=request["max_new_tokens"])
    rows = read_rows(task.data / "heldout")
    found: dict[str, Any] = {"losses": losses(graph, rows), "scores": scores(graph, spec, task, rows), "untuned": None}
    if request["untuned"]:
        with graph.disable_adapter():
            found["untuned"] = losses(graph, rows)
    return found


if __name__ == "__main__":
    answer(measure)
