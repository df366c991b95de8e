"""Measures one method in its own process: ``python -m finetune.bench.quantization_worker``."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.bench.quantization_forms import Workplace, make_form
from finetune.inference.fresh_process import serve_request

if TYPE_CHECKING:
    from finetune.bench.quantization_runners import Runner
    from finetune.model import ModelSpec

BATCHES = (1, 4, 16)
TEMPERATURE = 0.8
"""Of programs for pass@10. Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, section 3.3."""


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Gives the base a method's form and measures everything that the table shows.

    Args:
        request: ``method``, ``overrides`` (the model and the option, as a user types them), ``folder`` (the base),
            ``work`` (shared by all methods), ``run`` (with prepared rows, or None), ``rows`` (the text), ``threads``,
            ``dtype``, ``reference`` (of the full-precision model; its file is written where ``records``),
            ``batch_tokens``, ``repeats`` (timed repetitions of each speed; 0 measures none), ``task`` and ``humaneval``
            (or None).

    Returns:
        The figures of `finetune.bench.quantization_results.QuantizationResult`, and ``reference``.
    """
    import torch

    from finetune.inference.kl_divergence import ReferenceLogits, compare_with_reference, record_reference
    from finetune.products import PreparedData
    from finetune.run import RunFolder

    torch.set_num_threads(request["threads"])
    rows, tokens = request["rows"], request["batch_tokens"]
    data = RunFolder(Path(request["run"])).product("data", PreparedData) if request["run"] else None
    spec, longest = _spec(request), max(len(row["input_ids"]) for row in rows)
    form = make_form(request["method"], spec, Workplace(work=Path(request["work"]), data=data, context=longest))
    runner = form.runner
    speed = {name: speeds(getattr(runner, name), request["repeats"]) for name in ("prefill", "decode")}
    reference_request = dict(request["reference"])
    if reference_request.pop("records"):
        reference = record_reference(runner.model, rows, Path(reference_request["file"]), batch_tokens=tokens)
    else:
        reference = ReferenceLogits(**{**reference_request, "file": Path(reference_request["file"])})
    compared = compare_with_reference(runner.model, rows, reference, batch_tokens=tokens)
    problems = request["humaneval"]
    figures = {entry.name: getattr(form, entry.name) for entry in dataclasses.fields(form) if entry.name != "runner"}
    return {
        **figures,
        **speed,
        "losses": [[row.loss, row.tokens, row.correct] for row in compared.losses],
        "agreement": compared.distances,
        "scores": task_scores(runner, spec, request["task"], data.folder if data else None),
        "humaneval": programs(runner, problems, samples=1),
        "humaneval_sampled": programs(
            runner, request["humaneval"], samples=(request["humaneval"] or {}).get("samples", 0)
        ),
        "reference": dataclasses.asdict(dataclasses.replace(reference, losses=())),
    }


def _spec(request: dict[str, Any]) -> ModelSpec:
    from finetune import hardware
    from finetune.config import load as compose
    from finetune.model import Base, ModelSpec
    from finetune.model.base import weights_sha256

    config = compose(request["overrides"])
    placement = hardware.place(hardware.probe(config.hardware), config)
    placement = dataclasses.replace(placement, dtype=request["dtype"], threads=request["threads"])
    folder = Path(request["folder"])
    base = Base(folder=folder, name=str(folder), revision=None, sha256=weights_sha256(folder), source="folder")
    return ModelSpec(base=base, config=config.model, quantization=config.quantization, placement=placement)


def task_scores(runner: Runner, spec: ModelSpec, request: dict[str, Any] | None, data: Path | None) -> list[float]:
    """Scores the answers to the task's held-out rows; empty without a task."""
    from finetune.bench.task import Task, score_answers
    from finetune.inference.chat import load_chat
    from finetune.inference.rows import read_rows

    if request is None or data is None:
        return []
    task, rows, chat = Task(**request, data=data), read_rows(data / "heldout"), load_chat(spec, data)
    answers = runner.answers([row["prompt_ids"] for row in rows], limit=task.max_new_tokens, ends=chat.ends)
    return score_answers(answers, chat.tokenizer, task, rows)


def programs(runner: Runner, request: dict[str, Any] | None, *, samples: int) -> dict[str, Any]:
    """Measures HumanEval with one greedy program for each problem, or with several that are sampled."""
    from finetune.eval.humaneval import humaneval_sampling, read_problems, run_problems, summarize

    if request is None or not samples:
        return {}
    sampling = humaneval_sampling(request["max_new_tokens"], TEMPERATURE if samples > 1 else 0.0)
    problems = read_problems(Path(request["source"]))[: request["problems"]]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "completions.jsonl"
        return summarize(run_problems(problems, runner.completer(sampling), file, samples=samples, seed=1), seed=1)


def speeds(work: Callable[[int], int], repeats: int) -> dict[str, float]:
    """Returns tokens per second by batch size; empty without repetitions."""
    return {str(batch): tokens_per_second(partial(work, batch), repeats) for batch in BATCHES} if repeats else {}


def tokens_per_second(work: Callable[[], int], repeats: int) -> float:
    """Returns the fastest of ``repeats`` repetitions, after one that warms up."""
    work()
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        tokens = work()
        best = max(best, tokens / (time.perf_counter() - started))
    return round(best, 1)


if __name__ == "__main__":
    serve_request(measure)
