"""`finetune bench quantization`: measures every option of the quantization group on one model and one text, and writes
one page."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.bench.task import Task, change_figures, check_metric, model_overrides, run_pipeline, split_rows
from finetune.console import change_text, human_bytes, log, table
from finetune.errors import ConfigError
from finetune.hardware.backends import obstacle_on_dense_base
from finetune.paths import CONF

ROW_TOKENS, BATCH_TOKENS = 256, 1024
RESAMPLES = 2000
REFERENCE = "full precision"
HEADER = ("backend", "bits", "disk", "memory", "make, load: s", "perplexity", "loss against float32", "KL", "top-1")


@dataclass(frozen=True, kw_only=True)
class QuantizationResult:
    """Measurements of one quantization backend.

    Attributes:
        backend: The option's name, as in ``quantization=<backend>``.
        status: ``measured``, or ``not run:`` and why.
        bits_per_parameter: Bits of the linear layers' weights and constants, the head's left out, per weight.
        disk_bytes, memory_bytes, constant_bytes: Of the checkpoint; of all tensors in memory; of the constants alone.
        make_seconds: To load and quantize in a fresh process, imports of the model's and the library's code included,
            and to write the cached copy that later starts read.
        load_seconds: To load; where something is quantized, from that copy.
        perplexity, kl, top1_agreement: On the text; the last two against float32.
        loss_change: Nats per token against float32, with its 95 % interval over rows.
        prefill_tokens_per_second, decode_tokens_per_second: By batch size.
        task: The task's metric on held-out answers, with its 95 % interval; empty without a task.
        humaneval: pass@1 with its 95 % interval over problems; empty without problems.
        tunable: Whether an adapter can be trained on it, as the tests of its library do.
    """

    backend: str
    status: str
    bits_per_parameter: float | None = None
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    constant_bytes: int | None = None
    make_seconds: float | None = None
    load_seconds: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    loss_change: dict[str, float] = field(default_factory=dict)
    prefill_tokens_per_second: dict[str, float] = field(default_factory=dict)
    decode_tokens_per_second: dict[str, float] = field(default_factory=dict)
    task: dict[str, float] = field(default_factory=dict)
    humaneval: dict[str, float] = field(default_factory=dict)
    tunable: bool | None = None


@dataclass(frozen=True, kw_only=True)
class OptionalMeasurements:
    """Measurements besides those on the text.

    Attributes:
        repeats: Timed repetitions of each speed; 0 measures no speed, for a machine that is busy.
        task: JSON Lines in any format that ``data.path`` takes; None for no task.
        metric: Scores the task's answers.
        rows: Rows of the task to answer, after the first one, which the data stage needs to train on.
        max_new_tokens: Longest answer to the task and to HumanEval.
        humaneval: ``HumanEval.jsonl.gz``; None for none.
        problems: Number of its problems, from the top.
    """

    repeats: int
    task: Path | None
    metric: str
    rows: int
    max_new_tokens: int
    humaneval: Path | None
    problems: int


def compare_backends(
    *, model: str, text: Path, tokens: int, grid: str, out: Path, backends: list[str], optional: OptionalMeasurements
) -> None:
    """Measures, prints a table, writes ``out`` and ends with one line of JSON.

    Args:
        model: An option of the model group, or a value of ``model.name``.
        text: Plain text in UTF-8.
        tokens: Number of tokens to read from its beginning.
        grid: ``moved`` compares on a base whose weights lie on no quantization grid, ``as_it_is`` on the base itself.
        out: The page, one HTML file.
        backends: Options of the quantization group; empty for all.
        optional: Answers, programs and speeds.

    Raises:
        ConfigError: The text is missing or too short, or there is no such backend or metric.
    """
    from finetune.bench.off_grid import moved_off_the_grid
    from finetune.bench.quantization_page import write_page
    from finetune.config import load
    from finetune.model import fetch

    check_metric(optional.metric, where="bench quantization")
    names = quantization_options(backends, where="bench quantization")
    overrides = ["+experiment=quickstart", *model_overrides(model)]
    base = fetch(load(overrides).model)
    folder = base.folder if grid == "as_it_is" else moved_off_the_grid(base)
    rows = text_rows(text, base.folder, tokens)
    form = "as it is" if grid == "as_it_is" else "moved off any grid (see the page)"
    log("bench", f"{base.name}, {form}; {len(rows) * ROW_TOKENS:,} tokens")
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        work = Path(scratch)
        task = _prepare_task(optional, work, overrides)
        lab = _Lab(overrides=overrides, folder=folder, rows=rows, work=work, task=task, optional=optional)
        reference = lab.run("none", dtype="float32")
        results = [lab.measure(name, reference) for name in names]
    show(results, reference)
    full_precision = summarize(REFERENCE, reference, reference)
    write_page(out, results, reference=full_precision, text=text.name, grid=grid, model=base.name)
    log("bench", f"the page: {out}")
    sys.stdout.write(json.dumps([asdict(result) for result in results]) + "\n")


def quantization_options(backends: list[str], *, where: str) -> list[str]:
    """Returns the named options of the quantization group, or all of them.

    Raises:
        ConfigError: There is no such option.
    """
    options = sorted(file.stem for file in (CONF / "quantization").glob("*.yaml"))
    unknown = ", ".join(sorted(set(backends) - set(options)))
    if unknown:
        raise ConfigError(f"{where}: {unknown} is not an option of quantization; choose from {', '.join(options)}")
    return backends or options


def unsupported_status(name: str, *, trained: bool = False) -> str:
    """Explains why an option does not run here, with an adapter on it or without; empty for one that runs."""
    return f"not run: {reason}" if (reason := obstacle_on_dense_base(name, trained=trained)) else ""


def text_rows(text: Path, tokenizer: Path, tokens: int) -> list[dict[str, list[int]]]:
    """Cuts the text's beginning into rows of 256 tokens; every token but a row's first is predicted."""
    from transformers import AutoTokenizer

    if not text.is_file():
        raise ConfigError(f"bench quantization: text={text} is not a file; give plain text in UTF-8")
    ids = AutoTokenizer.from_pretrained(tokenizer)(text.read_text(encoding="utf-8"), verbose=False).input_ids[:tokens]
    rows = [ids[start : start + ROW_TOKENS] for start in range(0, len(ids) - ROW_TOKENS + 1, ROW_TOKENS)]
    if len(rows) < 2:
        raise ConfigError(
            f"bench quantization: {text} has {len(ids)} tokens and at least {2 * ROW_TOKENS} are needed; "
            "give a longer text or raise tokens"
        )
    return [{"input_ids": row, "labels": list(row)} for row in rows]


def _prepare_task(optional: OptionalMeasurements, work: Path, overrides: list[str]) -> Task | None:
    """Runs the data stage on the task's rows."""
    if optional.task is None:
        return None
    data = split_rows(optional.task, work / "task", train=1, heldout=optional.rows, where="bench quantization: task")
    run_pipeline([*overrides[1:], *data, "run.until=data"], root=work, name="rows")
    return Task(data=work / "rows" / "data", metric=optional.metric, max_new_tokens=optional.max_new_tokens)


@dataclass(frozen=True)
class _Lab:
    """What all measurements share."""

    overrides: list[str]
    folder: Path
    rows: list[dict[str, list[int]]]
    work: Path
    task: Task | None
    optional: OptionalMeasurements

    def run(self, name: str, *, dtype: str, reference: dict[str, Any] | None = None) -> dict[str, Any]:
        """Measures one option in a fresh process; without ``reference`` it becomes the reference."""
        from finetune.inference.fresh_process import run_in_fresh_process

        request = {
            "overrides": [*self.overrides, f"quantization={name}"],
            "folder": self.folder,
            "rows": self.rows,
            "dtype": dtype,
            "threads": len(os.sched_getaffinity(0)),
            "batch_tokens": BATCH_TOKENS,
            "reference": {**(reference or {"file": self.work / "reference.f32"}), "records": not reference},
            "repeats": self.optional.repeats,
            "task": self.task,
            "humaneval": self._humaneval(name) if reference else None,
        }
        # Its own cache, since a copy from an earlier run would be read where quantizing is timed.
        cache = {"FINETUNE_CACHE": str(self.work / "cache")}
        return run_in_fresh_process("finetune.bench.quantization_worker", request, work=self.work, environment=cache)

    def measure(self, name: str, reference: dict[str, Any]) -> QuantizationResult:
        """Measures one option; where it cannot run, the result says why and the others continue."""
        from finetune.inference.fresh_process import FreshProcessError

        if unsupported_status(name):
            return QuantizationResult(backend=name, status=unsupported_status(name))
        log("bench", f"{name} ...")
        try:
            figures = self.run(name, dtype="bfloat16", reference=reference["reference"])
        except FreshProcessError as error:
            return QuantizationResult(backend=name, status=f"not run: {str(error).splitlines()[-1]}")
        return summarize(name, figures, reference)

    def _humaneval(self, name: str) -> dict[str, Any] | None:
        if not self.optional.humaneval:
            return None
        return {
            "source": self.optional.humaneval,
            "problems": self.optional.problems,
            "quantization": name,
            "max_new_tokens": self.optional.max_new_tokens,
        }


def summarize(name: str, figures: dict[str, Any], reference: dict[str, Any]) -> QuantizationResult:
    """Builds a result from what the option's process and the reference's process returned."""
    from finetune.inference.bootstrap import Bootstrap, Ratio

    losses, reference_losses = (np.array(process["losses"]) for process in (figures, reference))
    ratio, reference_ratio = (Ratio(totals=side[:, 0], weights=side[:, 1]) for side in (losses, reference_losses))
    change = Bootstrap(len(losses), samples=RESAMPLES, seed=1).difference(reference_ratio, ratio)
    stored = figures["weight_bytes"] + figures["constant_bytes"]
    humaneval = figures["humaneval"].items()
    return QuantizationResult(
        backend=name,
        status="measured",
        bits_per_parameter=round(8 * stored / figures["quantized_parameters"], 3),
        disk_bytes=figures["disk_bytes"],
        memory_bytes=figures["memory_bytes"],
        constant_bytes=figures["constant_bytes"],
        make_seconds=figures["make_seconds"],
        load_seconds=figures["load_seconds"],
        perplexity=round(math.exp(ratio.value), 3),
        kl=round(figures["agreement"]["kl"], 5),
        top1_agreement=round(figures["agreement"]["top1_agreement"], 4),
        loss_change=change_figures(change),
        prefill_tokens_per_second=figures["prefill"],
        decode_tokens_per_second=figures["decode"],
        task=_level(figures["scores"]),
        humaneval={key.replace("pass_at_1_", "").replace("pass_at_1", "value"): value for key, value in humaneval},
        tunable=figures["tunable"],
    )


def _level(scores: list[float]) -> dict[str, float]:
    from finetune.inference.bootstrap import Bootstrap, mean_of

    if not scores:
        return {}
    return asdict(Bootstrap(len(scores), samples=RESAMPLES, seed=1).level(mean_of(scores)))


def show(results: list[QuantizationResult], reference: dict[str, Any]) -> None:
    """Prints the table."""
    total, tokens = (sum(row[column] for row in reference["losses"]) for column in (0, 1))
    log("bench", f"float32: perplexity {math.exp(total / tokens):.2f}")
    table("bench", HEADER, [cells(result)[: len(HEADER)] for result in results if result.status == "measured"])
    log("bench", *[f"{result.backend}: {result.status}" for result in results if result.status != "measured"])


def cells(result: QuantizationResult) -> list[str]:
    """Formats a measured backend's figures."""
    return [
        result.backend,
        f"{result.bits_per_parameter:.3f}",
        human_bytes(result.disk_bytes or 0),
        human_bytes(result.memory_bytes or 0),
        f"{result.make_seconds:.1f}, {result.load_seconds:.1f}",
        f"{result.perplexity:.2f}",
        change_text(result.loss_change),
        f"{result.kl:.4f}",
        f"{result.top1_agreement:.3f}",
        *[
            ", ".join(f"{speed:.0f} (batch {batch})" for batch, speed in speeds.items()) or "not measured"
            for speeds in (result.prefill_tokens_per_second, result.decode_tokens_per_second)
        ],
        *[_interval(level) for level in (result.task, result.humaneval)],
        "yes" if result.tunable else "no",
    ]


def _interval(level: dict[str, float]) -> str:
    return f"{level['value']:.2f} [{level['low']:.2f}, {level['high']:.2f}]" if level else "not measured"
