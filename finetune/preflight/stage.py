"""The verb: runs each proof, prints one line for it, stops the run where one fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import TrainError
from finetune.preflight.config import PreflightConfig
from finetune.products import PreflightResult

if TYPE_CHECKING:
    from finetune.preflight.checks import Check
    from finetune.preflight.context import CheckContext
    from finetune.preflight.trial import MakeTrainer
    from finetune.trainable import TrainingJob

DISK = "the disk is full or cannot be written: free some, or choose another run.root"
MEMORY = "this batch does not fit in memory: a smaller train.micro_batch or data.pack_tokens; `finetune plan --fit` proposes settings"
"""Causes of what ends a proof before it has a figure."""


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
        make_trainer: ``finetune.train.trainer.make_trainer``. Without it the checks that need a trainer are skipped, and
            the log says so.
        until: ``run.until``.

    Raises:
        TrainError: Another check failed; the message has the figure, the bound and the likely cause.
    """
    if config.level == "off":
        log("preflight", "skipped (preflight=off); the report will say so")
        return PreflightResult(folder=folder, checks=[], packing_is_isolated=True, fused_layers_are_exact=True)
    from finetune.preflight import result_cache

    name = result_cache.name_of(config, job, until=until)
    before = None if make_trainer is None or until == "preflight" else result_cache.find(name)
    if before:
        log("preflight", *again(before))
        result_cache.restore_text(name, folder)
        return PreflightResult(folder=folder, **before)
    from finetune.preflight.build_context import make_context
    from finetune.preflight.checks import CHECKS, ISOLATION, SPEED

    started = time.monotonic()
    with TemporaryDirectory(prefix=".work-", dir=folder) as work:
        context = make_context(
            config, folder=Path(work), run=folder.parent, job=job, make_trainer=make_trainer, until=until
        )
        results, skipped = attempt(
            context, [proof for proof in CHECKS if config.level == "full" or not proof.only_full]
        )
        training_seconds = context.training_seconds
    if config.level == "quick":
        skipped += [told(proof, "only preflight=full") for proof in CHECKS if proof.only_full]
    seconds = time.monotonic() - started
    log("preflight", *summary(config, results, skipped, seconds=seconds, training_seconds=training_seconds))
    stop_where_failed(results, spared=(ISOLATION.name, SPEED.name))
    passed = {proof["name"]: proof["passed"] for proof in results}
    product: dict[str, Any] = {
        "checks": results,
        "packing_is_isolated": passed.get(ISOLATION.name, True),
        "fused_layers_are_exact": passed.get(SPEED.name, True),
        "skipped": skipped,
        "seconds": round(seconds, 2),
        "training_seconds": training_seconds,
        "day": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }
    if all(passed.values()):
        result_cache.keep(name, product, folder)
    return PreflightResult(folder=folder, **product)


def attempt(context: CheckContext, proofs: Sequence[Check]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Runs proofs one after the other, each said as it ends; what the first two find decides how the others compute.

    Returns:
        The proofs as the manifest has them, and those that could not be tried here.
    """
    from safetensors import SafetensorError

    from finetune.inference.fresh_process import FreshProcessError
    from finetune.preflight.context import CheckResult, CheckSkipped

    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for proof in proofs:
        started, cause = time.monotonic(), proof.cause
        try:
            found = proof.prove(context)
        except CheckSkipped as reason:
            skipped.append(told(proof, str(reason)))
            continue
        except (
            RuntimeError,
            OSError,
            MemoryError,
            SafetensorError,
            FreshProcessError,
        ) as error:  # what cannot be carried out is not proved
            found = CheckResult(
                passed=False, figure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", bound="no error"
            )
            if isinstance(error, (OSError, SafetensorError)):
                cause = DISK
            elif isinstance(error, MemoryError) or "memory" in str(error).lower():
                cause = MEMORY
        seconds = round(time.monotonic() - started, 2)
        results.append(
            {"name": proof.name, **found._asdict(), "sentence": proof.sentence, "cause": cause, "seconds": seconds}
        )
        log(
            "preflight",
            f"{'holds' if found.passed else 'FAILS'}: {proof.sentence} ({found.figure}; bound {found.bound})",
        )
        if not found.passed:
            context.apply_failure(proof.name)
    return results, skipped


def again(before: dict[str, Any]) -> list[str]:
    """What an earlier rehearsal of the very same found."""
    proofs, skipped = before["checks"], before["skipped"]
    lines = [
        f"{len(proofs)} proofs held on {before['day']}, on the same base, rows, settings, code and processor: {names(proofs)}"
    ]
    lines += [f"not run then: {names(skipped)}"] if skipped else []
    return [*lines, "`finetune rehearse` runs them again"]


def names(proofs: Sequence[dict[str, Any]]) -> str:
    return ", ".join(proof["name"] for proof in proofs)


def told(proof: Check, why: str) -> dict[str, str]:
    """A proof that did not run."""
    return {"name": proof.name, "sentence": proof.sentence, "why": why}


def summary(
    config: PreflightConfig,
    results: Sequence[Any],
    skipped: Sequence[dict[str, str]],
    *,
    seconds: float,
    training_seconds: float | None,
) -> list[str]:
    """How many ran, what that cost, and which did not run and why."""
    share = (
        f", {seconds / training_seconds:.0%} of the {training_seconds:.0f} s that training will take, about"
        if training_seconds
        else ""
    )
    lines = [f"{config.level}: {len(results)} proofs in {seconds:.1f} s{share}"]
    if skipped:
        reasons = sorted({one["why"] for one in skipped})
        lines += [
            f"not run ({reason}): " + "; ".join(one["sentence"] for one in skipped if one["why"] == reason)
            for reason in reasons
        ]
    return lines


def stop_where_failed(results: Sequence[dict[str, Any]], *, spared: Sequence[str]) -> None:
    """
    Args:
        results: As the manifest has them.
        spared: Proofs whose failure has another consequence.

    Raises:
        TrainError: Another one failed.
    """
    failed = [proof for proof in results if not proof["passed"] and proof["name"] not in spared]
    if failed:
        lines = "; ".join(
            f"{proof['sentence']}: {proof['figure']}, bound {proof['bound']}. Likely cause: {proof['cause']}"
            for proof in failed
        )
        raise TrainError(f"rehearse: {len(failed)} of {len(results)} proofs fail, so nothing is trained. {lines}")
