"""`finetune bench tuning`: trains one task with one budget on every quantization backend.

Asks in small what Dettmers et al. 2023 (QLoRA, section 4) asked: is tuning on 4 bits as good as on 16? And what is left
of it in a model that is used in 4 bits: every adapter is also merged into the original base and rounded to NF4, as
``export=bitsandbytes`` does. Each training and each measurement is a process of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from finetune.bench.task import change_figures, check_metric, model_overrides, run_pipeline, split_rows
from finetune.console import change_text, human_bytes, log, table

TOKENS_PER_STEP = 512
RESAMPLES = 2000
YARDSTICK = "none"
"""LoRA on the unquantized base, which the others are compared with."""

HEADER = (
    *("backend", "base", "untuned loss", "loss", "against none", "by seed"),
    *("loss in 4 bits", "against none", "peak memory", "seconds", "tokens/s"),
)


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """Trainings on one quantization backend, over all seeds.

    Attributes:
        backend: The option's name, as in ``quantization=<backend>``.
        status: ``measured``, or ``not run:`` and why.
        untuned_loss: Nats per trained token of held-out rows before any step.
        loss: The same afterwards, mean over seeds; by seed in ``losses``.
        loss_change: Against ``none``, ``{"difference", "low", "high"}``: 95 %, paired by row, seeds pooled.
        loss_change_by_seed: The difference for each seed.
        rounded_loss, rounded_change, rounded_losses: The same of the 4-bit export, against ``none`` as it was trained.
        metric, metric_change: The same of the answers; empty without a metric. ``rounded_metric`` and
            ``rounded_metric_change`` are those of the 4-bit export.
        base_bytes: The base in memory.
        peak_rss_bytes, seconds: Of a training's whole process: the largest, and the mean.
        tokens_per_second: In the training loop, mean.
    """

    backend: str
    status: str
    untuned_loss: float | None = None
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    loss_change: dict[str, float] = field(default_factory=dict)
    loss_change_by_seed: list[float] = field(default_factory=list)
    rounded_loss: float | None = None
    rounded_losses: list[float] = field(default_factory=list)
    rounded_change: dict[str, float] = field(default_factory=dict)
    metric: dict[str, float] = field(default_factory=dict)
    metric_change: dict[str, float] = field(default_factory=dict)
    rounded_metric: dict[str, float] = field(default_factory=dict)
    rounded_metric_change: dict[str, float] = field(default_factory=dict)
    base_bytes: int | None = None
    peak_rss_bytes: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class TuningBudget:
    """What every training gets.

    Attributes:
        steps: Optimizer steps of about 512 tokens.
        learning_rate: The peak, which decays linearly to 0.
        seeds: Number of seeds, each of the adapter's first weights and the order of rows.
        metric: Of `finetune.eval.metrics`; empty for the loss alone.
        max_new_tokens: Longest answer.
    """

    steps: int
    learning_rate: float
    seeds: int
    metric: str
    max_new_tokens: int

    def overrides(self) -> list[str]:
        """Returns the budget as overrides."""
        return [
            f"train.steps={self.steps}",
            f"train.tokens_per_step={TOKENS_PER_STEP}",
            f"data.max_tokens={TOKENS_PER_STEP}",
            "train.evaluations=0",
            "train.checkpoints=0",
            "optim=adamw",
            f"optim.learning_rate={self.learning_rate}",
            "optim.schedule=linear",
            "optim.max_grad_norm=1.0",
            "run.until=train",
        ]


def compare_tuning(
    *,
    source: Path | None,
    rows: int,
    heldout: int,
    model: str,
    grid: str,
    backends: list[str],
    budget: TuningBudget,
    out: Path,
) -> None:
    """Trains and measures, writes ``out`` after each seed, and ends with a table and one line of JSON.

    Args:
        source: JSON Lines; None takes the shipped requests.
        rows: Rows to train on, from the top; the shipped rows have their own split.
        heldout: The next rows, to measure on.
        model: An option of the model group, or a value of ``model.name``.
        grid: ``moved`` tunes on a base whose weights lie on no quantization grid, ``as_it_is`` on the base itself.
        backends: Options of the quantization group; ``none`` is always among them.
        budget: The same for all.
        out: The table, JSON.

    Raises:
        ConfigError: The source is too short, or there is no such backend or metric.
    """
    from finetune.bench.quantization import quantization_options, unsupported_status

    check_metric(budget.metric, where="bench tuning")
    names = list(dict.fromkeys([YARDSTICK, *quantization_options(backends, where="bench tuning")]))
    base = _off_grid(model) if grid == "moved" else model_overrides(model)
    trainings: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="finetune-tuning-") as scratch:
        work = Path(scratch)
        data = split_rows(source, work, train=rows, heldout=heldout, where="bench tuning: source") if source else []
        for seed in range(1, budget.seeds + 1):  # seed by seed, so that other load on the machine affects all alike
            for name in [name for name in names if not unsupported_status(name, trained=True)]:
                overrides = [*base, *data, f"quantization={name}", f"run.seed={seed}", *budget.overrides()]
                training = _train(overrides, work, name=f"{name}-{seed}", budget=budget, untuned=seed == 1)
                trainings.setdefault(name, []).append(training)
            results = [
                summarize(name, trainings[name], trainings[YARDSTICK])
                if name in trainings
                else TuningResult(backend=name, status=unsupported_status(name, trained=True))
                for name in names
            ]
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n", encoding="utf-8")
    show(results, budget)
    sys.stdout.write(json.dumps([asdict(result) for result in results]) + "\n")


def _off_grid(model: str) -> list[str]:
    from finetune.bench.off_grid import moved_off_the_grid
    from finetune.config import load
    from finetune.model import fetch

    base = fetch(load(["+experiment=quickstart", *model_overrides(model)]).model)
    return model_overrides(str(moved_off_the_grid(base)))


def _train(overrides: Sequence[str], work: Path, *, name: str, budget: TuningBudget, untuned: bool) -> dict[str, Any]:
    """Trains and measures once; the run's folder is deleted afterwards."""
    from finetune.inference.fresh_process import run_in_fresh_process

    seconds, peak = run_pipeline(overrides, root=work, name=name)
    run = work / name
    request = {
        "run": run,
        "overrides": json.loads((run / "overrides.json").read_text()),
        "metric": budget.metric,
        "max_new_tokens": budget.max_new_tokens,
        "untuned": untuned,
    }
    figures = run_in_fresh_process("finetune.bench.tuning_worker", request, work=work)
    trained, loaded = (json.loads((run / stage / "manifest.json").read_text()) for stage in ("train", "model"))
    shutil.rmtree(run)
    log(
        "bench",
        f"{name}: held-out loss {_loss(figures['losses']):.4f}, in 4 bits {_loss(figures['rounded_losses']):.4f}, "
        f"{seconds:.0f} s, peak {human_bytes(peak)}",
    )
    return figures | {
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "tokens_per_second": trained["product"]["tokens_per_second"],
        "base_bytes": loaded["product"]["bytes"],
    }


def summarize(name: str, runs: list[dict[str, Any]], yardstick: list[dict[str, Any]]) -> TuningResult:
    """Builds a backend's result from its trainings and the yardstick's, one of each per seed."""
    losses, yardstick_losses, rounded_losses = (
        [_loss(run[key]) for run in side]
        for side, key in ((runs, "losses"), (yardstick, "losses"), (runs, "rounded_losses"))
    )
    changes = [loss - other for loss, other in zip(losses, yardstick_losses, strict=True)]
    metric, metric_change = _metric(runs, "scores", yardstick)
    rounded_metric, rounded_metric_change = _metric(runs, "rounded_scores", yardstick)
    return TuningResult(
        backend=name,
        status="measured",
        untuned_loss=round(_loss(runs[0]["untuned"]), 4),
        loss=round(mean(losses), 4),
        losses=[round(loss, 4) for loss in losses],
        loss_change=_loss_change(runs, "losses", yardstick),
        loss_change_by_seed=[round(change, 4) for change in changes],
        rounded_loss=round(mean(rounded_losses), 4),
        rounded_losses=[round(loss, 4) for loss in rounded_losses],
        rounded_change=_loss_change(runs, "rounded_losses", yardstick),
        metric=metric,
        metric_change=metric_change,
        rounded_metric=rounded_metric,
        rounded_metric_change=rounded_metric_change,
        base_bytes=runs[0]["base_bytes"],
        peak_rss_bytes=max(run["peak_rss_bytes"] for run in runs),
        seconds=round(mean(run["seconds"] for run in runs), 1),
        tokens_per_second=round(mean(run["tokens_per_second"] for run in runs), 1),
    )


def _loss_change(runs: list[dict[str, Any]], key: str, yardstick: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the change of loss against the yardstick as it was trained, paired by row, seeds pooled."""
    from finetune.inference.bootstrap import Bootstrap, Ratio

    totals = [np.sum([run[name] for run in side], axis=0) for side, name in ((yardstick, "losses"), (runs, key))]
    ratios = [Ratio(totals=side[:, 0], weights=side[:, 1]) for side in totals]
    return change_figures(Bootstrap(len(totals[0]), samples=RESAMPLES, seed=1).difference(*ratios))


def _metric(
    runs: list[dict[str, Any]], key: str, yardstick: list[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the metric and its change, as `_loss_change`; both empty without a metric."""
    from finetune.inference.bootstrap import Bootstrap, mean_of

    if not runs[0][key]:
        return {}, {}
    before, after = (
        mean_of(list(np.mean([run[name] for run in side], axis=0)))
        for side, name in ((yardstick, "scores"), (runs, key))
    )
    bootstrap = Bootstrap(len(runs[0][key]), samples=RESAMPLES, seed=1)
    metric = {name: round(value, 4) for name, value in asdict(bootstrap.level(after)).items()}
    return metric, change_figures(bootstrap.difference(before, after))


def _loss(rows: list[list[float]]) -> float:
    totals = np.sum(rows, axis=0)
    return float(totals[0] / totals[1])


def show(results: list[TuningResult], budget: TuningBudget) -> None:
    """Prints the table."""
    metric = budget.metric
    metric_columns = (metric, "against none", f"{metric} in 4 bits", "against none") if metric else ()
    rows = [_cells(result) for result in results if result.status == "measured"]
    table("bench", [*HEADER, *metric_columns], rows)
    log("bench", *[f"{result.backend}: {result.status}" for result in results if result.status != "measured"])


def _cells(result: TuningResult) -> list[str]:
    measured = ((result.metric, result.metric_change), (result.rounded_metric, result.rounded_metric_change))
    metric = [cell for value, change in measured if value for cell in (f"{value['value']:.3f}", change_text(change))]
    return [
        result.backend,
        human_bytes(result.base_bytes or 0),
        f"{result.untuned_loss:.3f}",
        f"{result.loss:.4f}",
        change_text(result.loss_change),
        " ".join(f"{change:+.3f}" for change in result.loss_change_by_seed),
        f"{result.rounded_loss:.4f}",
        change_text(result.rounded_change),
        human_bytes(result.peak_rss_bytes or 0),
        f"{result.seconds:.0f}",
        f"{result.tokens_per_second:.0f}",
        *metric,
    ]
