"""Steps on one repeated batch: does the run's own trainer learn it, with its answers' ends, and do its files hold it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from finetune.inference.adapted import free_memory
from finetune.inference.generation import generate
from finetune.inference.rows import IGNORED
from finetune.memory import PeakMemory
from finetune.preflight.batch import documents, largest_rows
from finetune.preflight.context import CheckContext
from finetune.preflight.stop_tokens import end_tokens_of
from finetune.preflight.trial import GradientRecorder

if TYPE_CHECKING:
    from datasets import Dataset

LOOK_STEPS = 8
"""Steps between two looks at what was learnt."""

FALL_SHARE = 0.01
"""The same batch in every step and no dropout's luck over a whole batch: whatever learns at all is far beyond it."""

EVALUATED_ROWS = 8
"""Held-out rows of the evaluation, the longest ones: they make its largest batch."""

ANSWERS = 16
"""Answers whose end is asked for, at most."""


@dataclass(frozen=True, kw_only=True)
class OverfitResult:
    """What the steps have shown.

    Attributes:
        losses: Of each step.
        answers: How many answers were asked to end.
        ended: How many of them did.
        tokens: Tokens of a step.
        rows: Rows at once.
        checkpoint_bytes: Of the checkpoint that was written.
        peak_bytes: Largest memory meanwhile: on the GPU, or of the whole process.
        logits: Last logits of the first document with the learnt adapter, by plain steps.
        adapter: Folder of the saved adapter.
    """

    losses: list[float]
    answers: int
    ended: int
    tokens: int
    rows: int
    checkpoint_bytes: int
    peak_bytes: int
    logits: Tensor
    adapter: Path

    @property
    def fall(self) -> float:
        """Share of the first loss that is gone."""
        return 1 - self.losses[-1] / self.losses[0]


class StopWhenLearned(TrainerCallback):
    """Ends the lesson when it is learnt, with the evaluation and the checkpoint that a training's end has."""

    def __init__(self, context: CheckContext, prompts: Sequence[list[int]], listener: GradientRecorder) -> None:
        self.context, self.prompts, self.listener, self.ended = context, prompts, listener, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step == state.max_steps
        if not last and state.global_step % LOOK_STEPS:
            return
        losses = self.listener.losses
        self.ended = self._ended()
        if last or (losses[-1] <= losses[0] * (1 - FALL_SHARE) and self.ended == len(self.prompts)):
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def _ended(self) -> int:
        context = self.context
        answers = generate(
            context.model, context.tokenizer, self.prompts, max_new_tokens=1, batch_rows=1, ends=sorted(end_tokens_of(context)),
        )  # fmt: skip
        return sum(answer.stopped for answer in answers)


def give(context: CheckContext, rows: Dataset, heldout: Dataset | None) -> OverfitResult:
    """Repeats the largest batch until it is learnt, evaluates, writes a checkpoint and saves the adapter; then all is as before.

    Args:
        context: Its trainer takes the steps.
        rows: data/train.
        heldout: data/heldout, or None.
    """
    train = context.job.config
    batch = largest_rows(rows, count=train.micro_batch)
    examined = largest_rows(heldout, count=EVALUATED_ROWS) if heldout is not None and train.evaluations else []
    listener = GradientRecorder(keeps_gradients=False)
    look = StopWhenLearned(context, prompts_of(context, batch) if train.objective == "sft" else [], listener)
    steps = context.trainer.trained(
        batch, micro_batch=len(batch), steps=context.config.steps, listener=listener, callbacks=[look], heldout=examined,
        evaluations=int(bool(examined)), checkpoints=1,
    )  # fmt: skip
    free_memory()
    on_gpu = context.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory(context.folder / "memory.jsonl", stage="preflight") as peak, steps as work:
        written = sum(file.stat().st_size for file in (work / "checkpoints").rglob("*") if file.is_file())
        context.model.save_pretrained(context.folder / "adapter")
        logits = context.logits(adapter=True)
    return OverfitResult(
        losses=listener.losses, answers=len(look.prompts), ended=look.ended, tokens=sum(sum(row["seq_lengths"]) for row in batch),
        rows=len(batch), checkpoint_bytes=written, logits=logits, adapter=context.folder / "adapter",
        peak_bytes=torch.cuda.max_memory_reserved() if on_gpu else peak.rss_bytes,
    )  # fmt: skip


def prompts_of(context: CheckContext, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Everything up to the end of turn of each document's last answer, the end itself left out."""
    ends = end_tokens_of(context)
    found: list[list[int]] = []
    for document in documents(rows)[:ANSWERS]:
        ids = document["input_ids"]
        last = max((place for place, label in enumerate(document["labels"]) if label != IGNORED), default=0)
        near = [place for place in range(max(1, last - 1), min(last + 2, len(ids))) if ids[place] in ends]
        if near:  # a text that was cut off has none
            found.append(ids[: near[-1]])
    return found
