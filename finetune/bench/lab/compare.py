"""`finetune bench quantization`: every option of the group on one model and one text, a process each, and one page."""

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

from finetune.bench.lab.task import Task, change_figures, check_metric, deal, line, model_choice
from finetune.console import change_text, human_bytes, log, table
from finetune.errors import ConfigError
from finetune.hardware.backends import BACKENDS
from finetune.paths import CONF

ROW_TOKENS = 256
BATCH_TOKENS = 1024
RESAMPLES = 2000
REFERENCE = "full precision"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One line of the table.

    Attributes:
        backend: The option's name, as in ``quantization=<backend>``.
        status: ``measured``, or ``not run:`` and why.
        bits_per_parameter: Weights and constants of the linear layers but the head over the weights that they stand for.
        disk_bytes, memory_bytes, constant_bytes: Of the checkpoint; of all tensors in memory; of the constants alone.
        make_seconds: To load and quantize in a fresh process, imports of the model's and the library's code included, and to
            write the copy that later starts read.
        load_seconds: To load; where something is quantized, from that copy.
        perplexity, kl, top1_agreement: On the text; the last two against float32.
        loss_change: Nats a token against float32, with its 95 % interval over rows.
        prefill_tokens_per_second, decode_tokens_per_second: By batch size.
        task: The task's metric on held-out answers, with its 95 % interval; empty where no task was given.
        humaneval: pass@1 with its 95 % interval over problems; empty where no problems were given.
        tunable: Whether an adapter can be trained on it: the tests of its library do.
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
class Further:
    """What is measured beside the text, where it is asked for.

    Attributes:
        repeats: Timed turns of each speed; 0 takes none, for a machine that is busy.
        task: JSON Lines in any format that ``data.path`` takes; None for no task.
        metric: How its answers are judged.
        rows: Of it, after the first, which a data stage needs to train on.
        max_new_tokens: Of an answer at most, to the task or to HumanEval.
        humaneval: ``HumanEval.jsonl.gz``; None for none.
        problems: Of it, from the top.
    """

    repeats: int
    task: Path | None
    metric: str
    rows: int
    max_new_tokens: int
    humaneval: Path | None
    problems: int


def compare(
    *, model: str, text: Path, tokens: int, grid: str, out: Path, backends: list[str], further: Further
) -> None:
    """Measures, prints a table, writes ``out`` and ends with one line of JSON.

    Args:
        model: An option of the model group, or whatever ``model.name`` takes.
        text: Plain text in UTF-8.
        tokens: Read from its beginning.
        grid: ``moved`` compares on a base whose weights lie on no quantization grid, ``as_it_is`` on the base itself.
        out: The page, one HTML file.
        backends: Options of the quantization group; empty for all.
        further: Answers and programs.

    Raises:
        ConfigError: The text is missing or too short, or there is no such backend or metric.
    """
    from finetune.bench.lab.layers import study
    from finetune.bench.lab.offgrid import moved_off_the_grid
    from finetune.bench.lab.page import write_page
    from finetune.config import load
    from finetune.model import fetch

    check_metric(further.metric, where="bench quantization")
    names = chosen(backends, where="bench quantization")
    choice = ["+experiment=quickstart", *model_choice(model)]
    base = fetch(load(choice).model)
    folder = base.folder if grid == "as_it_is" else moved_off_the_grid(base)
    rows = rows_of(text, base.folder, tokens)
    log(
        "bench",
        f"{base.name}, {'off any grid (see the page)' if grid != 'as_it_is' else 'as it is'}; {len(rows) * ROW_TOKENS:,} tokens",
    )
    with tempfile.TemporaryDirectory(prefix="finetune-lab-") as place:
        work = Path(place)
        lab = _Lab(
            choice=choice, folder=folder, rows=rows, work=work, task=_task(further, work, choice), further=further
        )
        reference = lab.run("none", dtype="float32")
        found = [lab.measured(name, reference) for name in names]
    show(found, reference)
    study_of = study(folder, rows)
    write_page(
        out,
        found,
        reference=summary(REFERENCE, reference, reference),
        study=study_of,
        text=text.name,
        grid=grid,
        model=base.name,
    )
    log("bench", f"the page: {out}")
    sys.stdout.write(json.dumps([asdict(one) for one in found]) + "\n")


def chosen(backends: list[str], *, where: str) -> list[str]:
    """The options of the quantization group that were named, or all of them.

    Raises:
        ConfigError: There is no such option.
    """
    options = sorted(file.stem for file in (CONF / "quantization").glob("*.yaml"))
    unknown = sorted(set(backends) - set(options))
    if unknown:
        raise ConfigError(f"{where}: {', '.join(unknown)} is no option of quantization; there are {', '.join(options)}")
    return backends or options


def refused(name: str) -> str:
    """Why an option does not run here, as a row's status; empty for one that does."""
    return f"not run: {BACKENDS[name].reason}" if name in BACKENDS and BACKENDS[name].reason else ""


def _task(further: Further, work: Path, choice: list[str]) -> Task | None:
    """The task's rows, rendered."""
    if further.task is None:
        return None
    settings = deal(further.task, work / "task", train=1, heldout=further.rows, where="bench quantization: task")
    line([*choice[1:], *settings, "run.until=data"], root=work, name="rows")
    return Task(data=work / "rows" / "data", metric=further.metric, max_new_tokens=further.max_new_tokens)


def rows_of(text: Path, tokenizer: Path, tokens: int) -> list[dict[str, list[int]]]:
    """The text's beginning in rows of 256 tokens; every token but a row's first is predicted."""
    from transformers import AutoTokenizer

    if not text.is_file():
        raise ConfigError(f"bench quantization: text={text} is no file; give plain text in UTF-8")
    ids = AutoTokenizer.from_pretrained(tokenizer)(text.read_text(encoding="utf-8"), verbose=False).input_ids[:tokens]
    rows = [ids[start : start + ROW_TOKENS] for start in range(0, len(ids) - ROW_TOKENS + 1, ROW_TOKENS)]
    if len(rows) < 2:
        raise ConfigError(
            f"bench quantization: {text} holds {len(ids)} tokens and at least {2 * ROW_TOKENS} are needed"
        )
    return [{"input_ids": row, "labels": list(row)} for row in rows]


@dataclass(frozen=True)
class _Lab:
    """What all measurements share."""

    choice: list[str]
    folder: Path
    rows: list[dict[str, list[int]]]
    work: Path
    task: Task | None
    further: Further

    def run(self, name: str, *, dtype: str, reference: dict[str, Any] | None = None) -> dict[str, Any]:
        from finetune.inference.fresh_process import run_in_fresh_process

        given = {**reference, "records": False} if reference else {"file": self.work / "reference.f32", "records": True}
        programs = {"source": self.further.humaneval, "problems": self.further.problems, "quantization": name}
        request = {
            "overrides": [*self.choice, f"quantization={name}"], "folder": self.folder, "rows": self.rows, "dtype": dtype,
            "threads": len(os.sched_getaffinity(0)), "batch_tokens": BATCH_TOKENS, "reference": given, "repeats": self.further.repeats,
            "task": self.task,
            "humaneval": {**programs, "max_new_tokens": self.further.max_new_tokens} if self.further.humaneval and reference else None,
        }  # fmt: skip
        # A cache of its own, or a copy that an earlier run left would be read where making one is timed.
        return run_in_fresh_process(
            "finetune.bench.lab.one", request, work=self.work, environment={"FINETUNE_CACHE": str(self.work / "cache")}
        )

    def measured(self, name: str, reference: dict[str, Any]) -> Measured:
        """One backend; what cannot run says why and the others go on."""
        from finetune.inference.fresh_process import FreshProcessError

        if refused(name):
            return Measured(backend=name, status=refused(name))
        log("bench", f"{name} ...")
        try:
            got = self.run(name, dtype="bfloat16", reference=reference["reference"])
        except FreshProcessError as error:
            return Measured(backend=name, status=f"not run: {str(error).splitlines()[-1]}")
        return summary(name, got, reference)


def summary(name: str, got: dict[str, Any], reference: dict[str, Any]) -> Measured:
    """What a process found, as a line of the table."""
    from finetune.inference.bootstrap import Bootstrap, Ratio

    ours, theirs = (
        Ratio(totals=np.array(side["losses"])[:, 0], weights=np.array(side["losses"])[:, 1])
        for side in (got, reference)
    )
    change = Bootstrap(len(got["losses"]), samples=RESAMPLES, seed=1).difference(theirs, ours)
    stored = got["weight_bytes"] + got["constant_bytes"]
    return Measured(
        backend=name,
        status="measured",
        bits_per_parameter=round(8 * stored / got["quantized_parameters"], 3),
        disk_bytes=got["disk_bytes"],
        memory_bytes=got["memory_bytes"],
        constant_bytes=got["constant_bytes"],
        make_seconds=got["make_seconds"],
        load_seconds=got["load_seconds"],
        perplexity=round(math.exp(ours.value), 3),
        kl=round(got["agreement"]["kl"], 5),
        top1_agreement=round(got["agreement"]["top1_agreement"], 4),
        loss_change=change_figures(change),
        prefill_tokens_per_second=got["prefill"],
        decode_tokens_per_second=got["decode"],
        task=_level(got["scores"]),
        humaneval={
            key.replace("pass_at_1_", "").replace("pass_at_1", "value"): value
            for key, value in got["humaneval"].items()
        },
        tunable=got["tunable"],
    )


def _level(scores: list[float]) -> dict[str, float]:
    from finetune.inference.bootstrap import Bootstrap, mean_of

    if not scores:
        return {}
    return asdict(Bootstrap(len(scores), samples=RESAMPLES, seed=1).level(mean_of(scores)))


def show(found: list[Measured], reference: dict[str, Any]) -> None:
    """The table in the terminal."""
    loss = sum(row[0] for row in reference["losses"]) / sum(row[1] for row in reference["losses"])
    log("bench", f"float32: perplexity {math.exp(loss):.2f}")
    head = ["backend", "bits", "disk", "memory", "make, load: s", "perplexity", "loss against float32", "KL", "top-1"]
    table("bench", head, [cells(one)[: len(head)] for one in found if one.status == "measured"])
    log("bench", *[f"{one.backend}: {one.status}" for one in found if one.status != "measured"])


def cells(one: Measured) -> list[str]:
    """A measured backend's figures as text."""
    return [
        one.backend,
        f"{one.bits_per_parameter:.3f}",
        human_bytes(one.disk_bytes or 0),
        human_bytes(one.memory_bytes or 0),
        f"{one.make_seconds:.1f}, {one.load_seconds:.1f}",
        f"{one.perplexity:.2f}",
        change_text(one.loss_change),
        f"{one.kl:.4f}",
        f"{one.top1_agreement:.3f}",
        by_batch(one.prefill_tokens_per_second),
        by_batch(one.decode_tokens_per_second),
        *[
            f"{level['value']:.2f} [{level['low']:.2f}, {level['high']:.2f}]" if level else "not asked"
            for level in (one.task, one.humaneval)
        ],
        "yes" if one.tunable else "no",
    ]


def by_batch(speeds: dict[str, float]) -> str:
    return ", ".join(f"{speed:.0f} (batch {batch})" for batch, speed in speeds.items()) or "not taken"
