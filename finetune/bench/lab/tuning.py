"""`finetune bench tuning`: one task, one budget, every way to hold the base; is tuning on four bits as good as on sixteen?

The question of Dettmers et al. 2023, QLoRA, section 4, in small. Each training and each measurement is a process of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from finetune.bench.lab.task import change_figures, check_metric, deal, line, model_choice
from finetune.console import change_text, human_bytes, log, table

TOKENS_PER_STEP = 512
RESAMPLES = 2000
YARDSTICK = "none"
"""LoRA on the unquantized base, which the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One way to hold the base, over all seeds.

    Attributes:
        backend: The option's name, as in ``quantization=<backend>``.
        status: ``measured``, or ``not run:`` and why.
        untuned_loss: Nats per trained token of held-out rows before any step.
        loss: The same afterwards, mean over seeds; by seed in ``losses``.
        loss_change: Against ``none``, ``{"difference", "low", "high"}``: 95 %, rows resampled, the same in both, seeds pooled.
        loss_change_by_seed: The difference for each seed.
        metric, metric_change: The same of the answers; empty where no metric was asked for.
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
    metric: dict[str, float] = field(default_factory=dict)
    metric_change: dict[str, float] = field(default_factory=dict)
    base_bytes: int | None = None
    peak_rss_bytes: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every training gets.

    Attributes:
        steps: Optimizer steps of about 512 tokens.
        learning_rate: The largest, decaying to 0 along a line.
        seeds: Of the adapter's first weights and of the order of rows.
        metric: Of `finetune.eval.metrics`; empty for the loss alone.
        max_new_tokens: Of an answer at most.
    """

    steps: int
    learning_rate: float
    seeds: int
    metric: str
    max_new_tokens: int

    def overrides(self) -> list[str]:
        return [
            f"train.steps={self.steps}", f"train.tokens_per_step={TOKENS_PER_STEP}", f"data.max_tokens={TOKENS_PER_STEP}",
            "train.evaluations=0", "train.checkpoints=0",
            "optim=adamw", f"optim.learning_rate={self.learning_rate}", "optim.schedule=linear", "optim.max_grad_norm=1.0",
            "run.until=train",
        ]  # fmt: skip


def tune(
    *,
    source: Path | None,
    rows: int,
    heldout: int,
    model: str,
    grid: str,
    backends: list[str],
    budget: Budget,
    out: Path,
) -> None:
    """Trains and measures, writes ``out`` after each seed, and ends with a table and one line of JSON.

    Args:
        source: JSON Lines; None takes the shipped requests.
        rows, heldout: Rows to train on, from the top, and the next ones to measure on. The shipped rows bring their own.
        model: An option of the model group, or whatever ``model.name`` takes.
        grid: ``moved`` tunes on a base whose weights lie on no quantization grid, ``as_it_is`` on the base itself.
        backends: Options of the quantization group; ``none`` is always among them.
        budget: The same for all.
        out: The table, JSON.

    Raises:
        ConfigError: The source is too short, or there is no such backend or metric.
    """
    from finetune.bench.lab.compare import chosen, refused
    from finetune.bench.lab.offgrid import moved_off_the_grid
    from finetune.config import load
    from finetune.model import fetch

    check_metric(budget.metric, where="bench tuning")
    names = [YARDSTICK, *[name for name in chosen(backends, where="bench tuning") if name != YARDSTICK]]
    choice = model_choice(model)
    if grid == "moved":
        choice = model_choice(str(moved_off_the_grid(fetch(load(["+experiment=quickstart", *choice]).model))))
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="finetune-tuning-") as place:
        work = Path(place)
        data = deal(source, work, train=rows, heldout=heldout, where="bench tuning: source") if source else []
        runs = [name for name in names if not refused(name)]
        for seed in range(1, budget.seeds + 1):  # turn by turn, so that what else the machine does falls on all alike
            for name in runs:
                overrides = [*choice, *data, f"quantization={name}", f"run.seed={seed}", *budget.overrides()]
                found.setdefault(name, []).append(
                    _one(overrides, work, name=f"{name}-{seed}", budget=budget, untuned=seed == 1)
                )
            lines = [
                summary(name, found[name], found[YARDSTICK])
                if name in found
                else Tuned(backend=name, status=refused(name))
                for name in names
            ]
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps([asdict(one) for one in lines], indent=2) + "\n", encoding="utf-8")
    show(lines, budget)
    sys.stdout.write(json.dumps([asdict(one) for one in lines]) + "\n")


def _one(overrides: Sequence[str], work: Path, *, name: str, budget: Budget, untuned: bool) -> dict[str, Any]:
    """Trains and measures once; the run is removed, its figures stay."""
    import shutil

    from finetune.inference.fresh_process import run_in_fresh_process

    seconds, peak = line(overrides, root=work, name=name)
    run = work / name
    request = {
        "run": run, "overrides": json.loads((run / "overrides.json").read_text()), "metric": budget.metric,
        "max_new_tokens": budget.max_new_tokens, "untuned": untuned,
    }  # fmt: skip
    got = run_in_fresh_process("finetune.bench.lab.tuned", request, work=work)
    trained, loaded = (
        json.loads((run / stage / "manifest.json").read_text())["product"] for stage in ("train", "model")
    )
    shutil.rmtree(run)
    log("bench", f"{name}: held-out loss {_loss(got['losses']):.4f}, {seconds:.0f} s, peak {human_bytes(peak)}")
    speed, size = trained["tokens_per_second"], loaded["bytes"]
    return {**got, "seconds": seconds, "peak_rss_bytes": peak, "tokens_per_second": speed, "base_bytes": size}


def summary(name: str, runs: list[dict[str, Any]], yardstick: list[dict[str, Any]]) -> Tuned:
    """One line of the table from what each seed gave."""
    from finetune.inference.bootstrap import Bootstrap, Ratio, mean_of

    pooled, theirs = (np.sum([run["losses"] for run in side], axis=0) for side in (runs, yardstick))
    draw = Bootstrap(len(pooled), samples=RESAMPLES, seed=1)
    change = draw.difference(*(Ratio(totals=side[:, 0], weights=side[:, 1]) for side in (theirs, pooled)))
    metric, metric_change = {}, {}
    if runs[0]["scores"]:
        ours, others = (mean_of(list(np.mean([run["scores"] for run in side], axis=0))) for side in (runs, yardstick))
        metric = {name: round(value, 4) for name, value in asdict(draw.level(ours)).items()}
        metric_change = change_figures(draw.difference(others, ours))
    losses = [_loss(run["losses"]) for run in runs]
    return Tuned(
        backend=name,
        status="measured",
        untuned_loss=round(_loss(runs[0]["untuned"]), 4),
        loss=round(mean(losses), 4),
        losses=[round(loss, 4) for loss in losses],
        loss_change=change_figures(change),
        loss_change_by_seed=[
            round(loss - _loss(other["losses"]), 4) for loss, other in zip(losses, yardstick, strict=True)
        ],
        metric=metric,
        metric_change=metric_change,
        base_bytes=runs[0]["base_bytes"],
        peak_rss_bytes=max(run["peak_rss_bytes"] for run in runs),
        seconds=round(mean(run["seconds"] for run in runs), 1),
        tokens_per_second=round(mean(run["tokens_per_second"] for run in runs), 1),
    )


def _loss(rows: list[list[float]]) -> float:
    totals = np.sum(rows, axis=0)
    return float(totals[0] / totals[1])


def show(lines: list[Tuned], budget: Budget) -> None:
    """The table in the terminal."""
    measured = [one for one in lines if one.status == "measured"]
    head = ["backend", "base", "untuned loss", "loss", "against none", "by seed", "peak memory", "seconds", "tokens/s"]
    rows = [
        [one.backend, human_bytes(one.base_bytes or 0), f"{one.untuned_loss:.3f}", f"{one.loss:.4f}", change_text(one.loss_change),
         " ".join(f"{by:+.3f}" for by in one.loss_change_by_seed), human_bytes(one.peak_rss_bytes or 0), f"{one.seconds:.0f}",
         f"{one.tokens_per_second:.0f}", *([f"{one.metric['value']:.3f}", change_text(one.metric_change)] if one.metric else [])]
        for one in measured
    ]  # fmt: skip
    table("bench", [*head, *([budget.metric, "against none"] if budget.metric else [])], rows)
    log("bench", *[f"{one.backend}: {one.status}" for one in lines if one.status != "measured"])
