"""Runs the checks, logs a line for each, and stops the run where one fails."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from finetune.console import log
from finetune.errors import TrainError
from finetune.objectives import OBJECTIVES
from finetune.preflight.config import PreflightConfig
from finetune.products import CheckRecord, PreflightResult, SkippedCheck

if TYPE_CHECKING:
    from finetune.preflight.checks import Check
    from finetune.preflight.context import CheckContext, CheckResult
    from finetune.preflight.trial import MakeTrainer
    from finetune.trainable import TrainingJob

DISK = "the disk is full or cannot be written: free some space, or choose another run.root"
MEMORY = (
    "this batch does not fit in memory: choose a smaller train.micro_batch or data.pack_tokens; `finetune plan --fit` "
    "proposes settings"
)
"""Causes of errors that end a check before it has a figure."""


def run_preflight(
    config: PreflightConfig,
    *,
    folder: Path,
    job: TrainingJob,
    make_trainer: MakeTrainer | None = None,
    until: str = "report",
) -> PreflightResult:
    """Checks on the real model and the first real rows that training will train what it should.

    Args:
        config: The preflight group.
        folder: Receives trained_text.txt; the run's folder is its parent.
        job: The training that is about to start; its model is left exactly as it was. Where packed documents are not
            isolated, or fused layers are not exact, ``job.trainable`` is switched to the way that is.
        make_trainer: ``finetune.train.trainer.make_trainer``. Without it the checks that need a trainer are skipped,
            and the log lists them.
        until: ``run.until``.

    Raises:
        TrainError: Another check failed; the message has the figure, the bound and the likely cause.
    """
    if config.level == "off":
        log("preflight", "skipped (preflight=off); the report will say so")
        return PreflightResult(folder=folder, checks=[], packing_is_isolated=True, fused_layers_are_exact=True)
    from finetune.preflight import result_cache

    name = result_cache.name_of(config, job, until=until)
    earlier = None if make_trainer is None or until == "preflight" else result_cache.find(name)
    if earlier:
        log("preflight", *describe_earlier(earlier))
        result_cache.restore_text(name, folder)
        return dataclasses.replace(earlier, folder=folder)
    from finetune.preflight.checks import FUSED_LAYERS, PACKING, checks_of

    started, checks = time.monotonic(), checks_of(job.config.objective)
    with TemporaryDirectory(prefix=".work-", dir=folder) as work:
        context = make_context(
            config, folder=Path(work), run=folder.parent, job=job, make_trainer=make_trainer, until=until
        )
        full = config.level == "full"
        records, skipped = run_checks(context, [check for check in checks if full or not check.only_full])
        training_seconds = context.training_seconds
    if not full:
        skipped += [skipped_check(check, why="only preflight=full") for check in checks if check.only_full]
    passed = {record.name: record.passed for record in records}
    result = PreflightResult(
        folder=folder,
        checks=records,
        packing_is_isolated=passed.get(PACKING.name, True),
        fused_layers_are_exact=passed.get(FUSED_LAYERS.name, True),
        skipped=skipped,
        seconds=round(time.monotonic() - started, 2),
        training_seconds=training_seconds,
        day=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    log("preflight", *summarize(config, result))
    stop_where_failed(records, tolerated=(PACKING.name, FUSED_LAYERS.name))
    if all(passed.values()):
        result_cache.remember(name, result)
    return result


def make_context(
    config: PreflightConfig, *, folder: Path, run: Path, job: TrainingJob, make_trainer: MakeTrainer | None, until: str
) -> CheckContext:
    """Makes the context of the checks for a level; see `run_preflight` for the arguments.

    Args:
        folder: Scratch space, which the caller deletes.
        run: The run's folder.

    Raises:
        TrainError: There are no rows.
    """
    from datasets import load_from_disk

    from finetune.preflight.batch import choose_rows
    from finetune.preflight.context import CheckContext
    from finetune.preflight.trial import TrialTrainer

    prepared = load_from_disk(str(job.data.folder / "train"))
    if not len(prepared):
        raise TrainError("data: none of the rows is left to train on; `finetune data` shows why each was dropped")
    micro_batch = job.config.micro_batch_rows if make_trainer else 1
    compares = OBJECTIVES[job.config.objective].compares
    if OBJECTIVES[job.config.objective].samples:
        micro_batch = config.rows  # prompts
    rows = choose_rows(config, prepared, micro_batch=micro_batch, compares=compares)
    trial = TrialTrainer(job=job, make_trainer=make_trainer, folder=folder) if make_trainer else None
    return CheckContext(config=config, job=job, rows=rows, run=run, folder=folder, until=until, trial=trial)


def run_checks(context: CheckContext, checks: Sequence[Check]) -> tuple[list[CheckRecord], list[SkippedCheck]]:
    """Runs checks one after the other and logs each; the first two decide how the others compute.

    Returns:
        The checks that ran, and those that could not run here.
    """
    from finetune.preflight.context import CheckSkipped

    records: list[CheckRecord] = []
    skipped: list[SkippedCheck] = []
    for check in checks:
        started = time.monotonic()
        try:
            result, cause = _run_check(context, check)
        except CheckSkipped as reason:
            skipped.append(skipped_check(check, why=str(reason)))
            continue
        record = CheckRecord(
            name=check.name,
            passed=result.passed,
            figure=result.figure,
            bound=result.bound,
            sentence=check.sentence,
            cause=cause,
            seconds=round(time.monotonic() - started, 2),
        )
        records.append(record)
        outcome = "PASS" if record.passed else "FAIL"
        log("preflight", f"{outcome}: {record.sentence} ({record.figure}; bound {record.bound})")
        if not record.passed:
            context.apply_failure(record.name)
    return records, skipped


def _run_check(context: CheckContext, check: Check) -> tuple[CheckResult, str]:
    """Returns the result and the likely cause of a failure. An error of torch or the system is a failure."""
    from safetensors import SafetensorError

    from finetune.inference.fresh_process import FreshProcessError
    from finetune.preflight.context import CheckResult

    try:
        return check.run(context), check.cause
    except (RuntimeError, OSError, MemoryError, SafetensorError, FreshProcessError) as error:
        cause = check.cause
        if isinstance(error, (OSError, SafetensorError)):
            cause = DISK
        elif isinstance(error, MemoryError) or "memory" in str(error).lower():
            cause = MEMORY
        figure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return CheckResult(passed=False, figure=figure, bound="without an error"), cause


def skipped_check(check: Check, *, why: str) -> SkippedCheck:
    """Describes a check that did not run."""
    return SkippedCheck(name=check.name, sentence=check.sentence, why=why)


def describe_earlier(result: PreflightResult) -> list[str]:
    """Describes an earlier preflight with the same inputs, in log lines."""
    inputs = "with the same base, rows, settings, code and processor"
    lines = [f"{len(result.checks)} checks passed on {result.day} {inputs}: {_names(result.checks)}"]
    lines += [f"not run then: {_names(result.skipped)}"] if result.skipped else []
    return [*lines, "`finetune preflight` runs them again"]


def summarize(config: PreflightConfig, result: PreflightResult) -> list[str]:
    """Returns log lines: how many checks passed, what that cost, and which did not run and why."""
    passed = sum(check.passed for check in result.checks)
    share = ""
    if result.training_seconds:
        share = f", {result.seconds / result.training_seconds:.0%} of the training's"
        share += f" estimated {result.training_seconds:.0f} s"
    lines = [f"{config.level}: {passed} of {len(result.checks)} checks passed in {result.seconds:.1f} s{share}"]
    for reason in sorted({check.why for check in result.skipped}):
        sentences = [check.sentence for check in result.skipped if check.why == reason]
        lines.append(f"not run ({reason}): {'; '.join(sentences)}")
    return lines


def stop_where_failed(records: Sequence[CheckRecord], *, tolerated: Sequence[str]) -> None:
    """Stops the run where a check failed.

    Args:
        records: The checks that ran.
        tolerated: Names of checks after whose failure the run continues in another way.

    Raises:
        TrainError: Another check failed.
    """
    failed = [record for record in records if not record.passed and record.name not in tolerated]
    if failed:
        lines = "; ".join(
            f"{record.sentence}: {record.figure}, bound {record.bound}. Likely cause: {record.cause}"
            for record in failed
        )
        raise TrainError(
            f"preflight: {len(failed)} of {len(records)} checks failed, so nothing was trained. Failed: {lines}"
        )


def _names(checks: Sequence[CheckRecord | SkippedCheck]) -> str:
    return ", ".join(check.name for check in checks)
