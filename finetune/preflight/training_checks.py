"""The proofs that take steps, files and a second process."""

from __future__ import annotations

import psutil
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from finetune.console import human_bytes
from finetune.inference.adapted import free_memory
from finetune.inference.fresh_process import run_in_fresh_process
from finetune.model.load import resident_bytes
from finetune.preflight import overfit
from finetune.preflight.context import CheckContext, CheckResult, CheckSkipped

RELOADED_SHARE = 0.02
"""Mean difference of the logits over their standard deviation: 0 was seen on a CPU; other kernels round to 8 bits, some 0.5 %.
A base that was quantized again, or an adapter that was lost, is beyond 10 %."""

SECOND_COPY = 1.5
"""A base that is being loaded takes about so much more than it does afterwards."""


def loss_falls_on_one_batch(context: CheckContext) -> CheckResult:
    """The run's optimizer at its own rate, on the largest batch again and again."""
    rows = load_from_disk(str(context.data.folder / "train"))
    heldout = load_from_disk(str(context.data.folder / "heldout")) if context.data.heldout_rows else None
    given = overfit.give(context, rows, heldout)
    context.lesson, rate = given, context.job.optim.learning_rate
    return CheckResult(
        passed=given.fall >= overfit.FALL_SHARE,
        figure=f"{given.losses[0]:.3f} -> {given.losses[-1]:.4f} in {len(given.losses)} steps at {rate:g}, each on {given.tokens:,} tokens",
        bound=f"at least {overfit.FALL_SHARE:.0%} less",
    )


def answers_end(context: CheckContext) -> CheckResult:
    """Greedy generation after each learnt answer, the answer itself given."""
    given = context.taught
    if not given.answers:
        raise CheckSkipped("no answer of the batch has an end of turn to stop at")
    return CheckResult(
        passed=given.ended == given.answers,
        figure=f"{given.ended} of {given.answers} after {len(given.losses)} steps",
        bound="all",
    )


def files_hold_the_model(context: CheckContext) -> CheckResult:
    """A fresh process loads base and saved adapter as the later stages do."""
    given = context.taught
    free_memory()
    needed, there = SECOND_COPY * resident_bytes(context.model), free_bytes(context.device)
    if needed > there:
        raise CheckSkipped(
            f"a second copy of the base needs {human_bytes(needed)} beside this one and {human_bytes(there)} are free"
        )
    request = {
        "spec": context.spec,
        "adapter": given.adapter, "input_ids": context.documents[0]["input_ids"], "logits": context.folder / "logits.safetensors",
    }  # fmt: skip
    run_in_fresh_process("finetune.preflight.reload", request, work=context.folder)
    again = load_file(context.folder / "logits.safetensors")["logits"].to(given.logits)
    share = float((again - given.logits).abs().mean() / given.logits.std())
    return CheckResult(
        passed=share <= RELOADED_SHARE,
        figure=f"mean logit difference {share:.2%} of their spread, largest {float((again - given.logits).abs().max()):.3g}",
        bound=f"{RELOADED_SHARE:.0%}",
    )


def free_bytes(device: str) -> int:
    """Memory that is free where the model lies."""
    return int(torch.cuda.mem_get_info()[0] if device.startswith("cuda") else psutil.virtual_memory().available)
