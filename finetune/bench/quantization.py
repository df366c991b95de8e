"""`finetune bench quantization`: measures every way to store a model, on one model and one text, and writes one page.

What was measured stays in a folder next to the page, one JSON file for each method, under everything that changes it.
The same command started again continues after the last finished method.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.bench.quantization_methods import (
    CALIBRATES,
    EXPORTS,
    choose_methods,
    libraries,
    obstacle,
    option_of,
)
from finetune.bench.quantization_results import REFERENCE, QuantizationResult, show, summarize
from finetune.bench.task import check_metric, model_overrides, run_pipeline, split_rows
from finetune.cache import file_sha256
from finetune.config.overrides import group_options
from finetune.console import log
from finetune.errors import ConfigError
from finetune.hardware.backends import obstacle_on_dense_base
from finetune.paths import CONF, SHIPPED
from finetune.run import fingerprint, write_json

ROW_TOKENS, BATCH_TOKENS = 256, 1024
QUICKSTART_ROWS = SHIPPED / "quickstart" / "train.jsonl"
SCHEMA = 1
"""Of the kept results; raised when what is measured, or how, changes."""


@dataclass(frozen=True, kw_only=True)
class OptionalMeasurements:
    """Measurements besides those on the text.

    Attributes:
        repeats: Timed repetitions of each speed; 0 measures no speed, for a machine that is busy.
        task: JSON Lines in any format that ``data.path`` takes; None for no task.
        metric: Scores the task's answers.
        rows: Rows of the task to answer, from the end; the rows before them are read for calibration.
        max_new_tokens: Longest answer to the task and to HumanEval.
        humaneval: ``HumanEval.jsonl.gz``; None for none.
        problems: Number of its problems, from the top.
        samples: Sampled programs of each problem, for pass@10; 0 samples none.
    """

    repeats: int
    task: Path | None
    metric: str
    rows: int
    max_new_tokens: int
    humaneval: Path | None
    problems: int
    samples: int


def compare_methods(
    *, model: str, text: Path, tokens: int, grid: str, out: Path, methods: list[str], optional: OptionalMeasurements
) -> None:
    """Measures, prints a table, writes ``out`` and ends with one line of JSON.

    Args:
        model: An option of the model group, or a value of ``model.name``.
        text: Plain text in UTF-8.
        tokens: Number of tokens to read from its beginning.
        grid: ``moved`` compares on a base whose weights lie on no quantization grid, ``as_it_is`` on the base itself.
        out: The page, one HTML file; results are kept in the folder of the same name without ``.html``.
        methods: Those of `quantization_methods`; empty for all.
        optional: Answers, programs and speeds.

    Raises:
        ConfigError: The text is missing or too short, or there is no such method or metric.
    """
    from finetune.bench.off_grid import in_half_precision, moved_off_the_grid
    from finetune.bench.quantization_page import write_page
    from finetune.config import load
    from finetune.model import fetch

    check_metric(optional.metric, where="bench quantization")
    for setting, file in (("task", optional.task), ("humaneval", optional.humaneval)):
        if file and not file.is_file():
            raise ConfigError(f"bench quantization: {setting}={file} is not a file")
    names = choose_methods(methods)
    overrides = ["+experiment=quickstart", *model_overrides(model)]
    base = fetch(load(overrides).model)
    folder = base.folder if grid == "as_it_is" else moved_off_the_grid(base)
    rows = text_rows(text, base.folder, tokens)
    form = "as it is" if grid == "as_it_is" else "moved off any grid (see the page)"
    log("bench", f"{base.name}, {form}; {len(rows) * ROW_TOKENS:,} tokens")
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        work = Path(scratch)
        half = in_half_precision(folder, work / "half")
        lab = Lab(
            overrides=overrides,
            folder=folder,
            half=half,
            rows=rows,
            work=work,
            kept=out.with_suffix(""),
            optional=optional,
        )
        reference, results = lab.measure_all(names)
    show(results, reference)
    full_precision = summarize(REFERENCE, reference, reference)
    write_page(out, results, reference=full_precision, text=text.name, grid=grid, model=base.name)
    log("bench", f"the page: {out}")
    sys.stdout.write(json.dumps([dataclasses.asdict(result) for result in results]) + "\n")


def quantization_options(wanted: list[str], *, where: str) -> list[str]:
    """Returns the named options of the quantization group, or all of them.

    Raises:
        ConfigError: There is no such option.
    """
    options = group_options("quantization", [CONF])
    unknown = ", ".join(sorted(set(wanted) - set(options)))
    if unknown:
        raise ConfigError(f"{where}: {unknown} is not an option of quantization; choose from {', '.join(options)}")
    return wanted or options


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


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Measures methods, each in its own process, and keeps their figures.

    Attributes:
        overrides: The model, as a user types it.
        folder: The base in full precision; the reference.
        half: The same base in 16 bits, of which every form is made.
        rows: The text.
        work: For files that are not kept.
        kept: For the figures.
        optional: What else is measured.
    """

    overrides: list[str]
    folder: Path
    half: Path
    rows: list[dict[str, list[int]]]
    work: Path
    kept: Path
    optional: OptionalMeasurements

    def measure_all(self, names: list[str]) -> tuple[dict[str, Any], list[QuantizationResult]]:
        """Returns the reference's figures and a result for each method; what is kept is not measured again."""
        runnable = [name for name in names if not obstacle(name)]
        kept = {name: figures for name in runnable if (figures := self._read(name))}
        if kept:
            log("bench", f"{len(kept)} of {len(runnable)} methods were measured before: {self.kept}")
        reference = self._read(REFERENCE)
        if reference is None or len(kept) < len(runnable):  # its logits are in a large file, which is not kept
            reference = self._run(REFERENCE, {"file": self.work / "reference.f32", "records": True})
            self._write(REFERENCE, reference)
        return reference, [
            summarize(name, kept[name], reference) if name in kept else self._measure(name, reference) for name in names
        ]

    def _measure(self, name: str, reference: dict[str, Any]) -> QuantizationResult:
        """Measures one method; where it cannot run, the result says why and the others continue."""
        from finetune.inference.fresh_process import FreshProcessError

        if reason := obstacle(name):
            return QuantizationResult(backend=name, status=f"not run: {reason}")
        log("bench", f"{name} ...")
        try:
            figures = self._run(name, {**reference["reference"], "records": False})
        except FreshProcessError as error:
            return QuantizationResult(backend=name, status=f"not run: {str(error).splitlines()[-1]}")
        self._write(name, figures)
        return summarize(name, figures, reference)

    def _run(self, name: str, reference: dict[str, Any]) -> dict[str, Any]:
        """Measures one method in a fresh process."""
        from finetune.inference.fresh_process import run_in_fresh_process

        is_reference, optional = name == REFERENCE, self.optional
        programs = {
            "source": optional.humaneval,
            "problems": optional.problems,
            "samples": optional.samples,
            "max_new_tokens": optional.max_new_tokens,
        }
        request = {
            "method": "none" if is_reference else name,
            "overrides": [*self.overrides, f"quantization={option_of(name)}"],
            "folder": self.folder if is_reference else self.half,
            "work": self.work,
            "run": self._prepared if optional.task or name in CALIBRATES else None,
            "rows": self.rows,
            "dtype": "float32" if is_reference else "bfloat16",
            "threads": len(os.sched_getaffinity(0)),
            "batch_tokens": BATCH_TOKENS,
            "reference": reference,
            "repeats": optional.repeats,
            "task": {"metric": optional.metric, "max_new_tokens": optional.max_new_tokens} if optional.task else None,
            "humaneval": programs if optional.humaneval else None,
        }
        # Its own cache, since a copy from an earlier run would be read where quantizing is timed.
        cache = {"FINETUNE_CACHE": str(self.work / "cache")}
        return run_in_fresh_process("finetune.bench.quantization_worker", request, work=self.work, environment=cache)

    @cached_property
    def _prepared(self) -> Path:
        """The folder of a run whose data stage read the task's rows, or the quickstart's."""
        data = []
        if source := self.optional.task:
            heldout, folder = self.optional.rows, self.work / "task"
            data = split_rows(source, folder, train=None, heldout=heldout, where="bench quantization: task")
        run_pipeline([*self.overrides[1:], *data, "run.until=data"], root=self.work, name="rows")
        return self.work / "rows"

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.file(name)
        figures: dict[str, Any] | None = json.loads(file.read_text("utf-8"))["figures"] if file.is_file() else None
        return figures

    def _write(self, name: str, figures: dict[str, Any]) -> None:
        self.kept.mkdir(parents=True, exist_ok=True)
        write_json(self.file(name), {"key": self._key(name), "figures": figures})

    def file(self, name: str) -> Path:
        """Returns where a method's figures are kept."""
        return self.kept / f"{name.replace(' ', '_')}-{fingerprint(self._key(name))[:16]}.json"

    def _key(self, name: str) -> dict[str, Any]:
        """Returns everything that changes a method's figures."""
        from finetune.config import load
        from finetune.environment import code, package_version
        from finetune.model.base import weights_sha256

        optional, packages = self.optional, ("torch", "transformers", *libraries(name))
        task, programs = optional.task, optional.humaneval
        measured = ("quantization", "inference", "model", *(("export",) if name in EXPORTS else ()))
        settings = load([*self.overrides, f"quantization={option_of(name)}"])
        return {
            "schema": SCHEMA,
            "method": name,
            "settings": dataclasses.asdict(settings.quantization),
            "base": weights_sha256(self.folder),
            "text": fingerprint(self.rows),
            "repeats": optional.repeats,
            "calibration": file_sha256(task or QUICKSTART_ROWS) if name in CALIBRATES else None,
            "task": [file_sha256(task), optional.metric, optional.rows] if task else None,
            "humaneval": [file_sha256(programs), optional.problems, optional.samples] if programs else None,
            "max_new_tokens": optional.max_new_tokens,
            "versions": {package: package_version(package) for package in packages},
            "code": {package: digest for package, digest in code().items() if package in measured},
            "machine": [platform.node(), platform.machine(), len(os.sched_getaffinity(0))],
        }
