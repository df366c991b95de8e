"""Checks that take optimizer steps, files and a second process."""

from __future__ import annotations

from datasets import load_from_disk
from safetensors.torch import load_file

from finetune.console import human_bytes
from finetune.inference.adapted import free_memory
from finetune.inference.fresh_process import run_in_fresh_process
from finetune.memory import free_bytes
from finetune.model.load import resident_bytes
from finetune.preflight.context import CheckContext, CheckResult, CheckSkipped
from finetune.preflight.overfit import FALL_BOUND, overfit_one_batch

RELOADED_BOUND = 0.02
"""Mean difference of the logits over their standard deviation. The same kernels give 0; other kernels round to
bfloat16, whose unit roundoff is 2^-8, which makes some 0.5 %. A base that was quantized again, or a lost adapter, is
beyond 10 %."""

LOADING_FACTOR = 1.5
"""Memory of a base while it is being loaded over its memory afterwards."""


def check_learning(context: CheckContext) -> CheckResult:
    """Overfits the largest batch with the run's optimizer at its own learning rate."""
    rows = load_from_disk(str(context.data.folder / "train"))
    heldout = load_from_disk(str(context.data.folder / "heldout")) if context.data.heldout_rows else None
    result = context.overfit_result = overfit_one_batch(context, rows, heldout)
    losses, rate = result.losses, context.job.optim.learning_rate
    steps = f"{len(losses)} steps of {result.tokens:,} tokens at learning rate {rate:g}"
    return CheckResult(
        passed=result.fall >= FALL_BOUND,
        figure=f"{losses[0]:.3f} -> {losses[-1]:.4f} in {steps}",
        bound=f"at least {FALL_BOUND:.0%} less",
    )


def check_ending(context: CheckContext) -> CheckResult:
    """Counts the trained answers after which greedy generation stops; the answer is part of the prompt."""
    overfit = context.overfit
    if not overfit.answers:
        raise CheckSkipped("none of the batch's answers has an end of turn to stop at")
    return CheckResult(
        passed=overfit.ended == overfit.answers,
        figure=f"{overfit.ended} of {overfit.answers} after {len(overfit.losses)} steps",
        bound="all",
    )


def check_reload(context: CheckContext) -> CheckResult:
    """Compares the logits in memory with those of a fresh process that loads base and adapter as later stages do."""
    overfit, file = context.overfit, context.folder / "logits.safetensors"
    free_memory()
    needed, free = LOADING_FACTOR * resident_bytes(context.model), free_bytes(context.device)
    if needed > free:
        raise CheckSkipped(f"a second copy of the base needs {human_bytes(needed)} and {human_bytes(free)} are free")
    request = {
        "spec": context.spec,
        "adapter": overfit.adapter,
        "input_ids": context.rows.documents[0]["input_ids"],
        "logits": file,
    }
    run_in_fresh_process("finetune.preflight.reload", request, work=context.folder)
    difference = (load_file(file)["logits"].to(overfit.logits) - overfit.logits).abs()
    share = float(difference.mean() / overfit.logits.std())
    return CheckResult(
        passed=share <= RELOADED_BOUND,
        figure=f"mean logit difference {share:.2%} of their standard deviation, largest {float(difference.max()):.3g}",
        bound=f"{RELOADED_BOUND:.0%}",
    )
