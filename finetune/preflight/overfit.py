"""Overfits one batch with the run's own trainer, which shows whether answers and their ends are learned and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback

from finetune.inference.adapted import free_memory
from finetune.inference.generation import generate
from finetune.inference.rows import IGNORED
from finetune.memory import PeakMemory
from finetune.objectives import OBJECTIVES
from finetune.preflight.batch import documents, largest_rows
from finetune.preflight.context import CheckContext
from finetune.preflight.trial import GradientRecorder

if TYPE_CHECKING:
    from datasets import Dataset

STEPS_BETWEEN_TESTS = 8
"""Steps after which it is tested whether the batch is learned."""

FALL_BOUND = 0.01
"""Share of the first loss. Every step has the same batch, so whatever learns at all is far beyond it."""

EVALUATED_ROWS = 8
"""Held-out rows of the evaluation, the longest ones: they make its largest batch."""

MAX_ANSWERS = 16
"""Upper limit on the answers after which generation has to stop."""


@dataclass(frozen=True, kw_only=True)
class OverfitResult:
    """What overfitting one batch has shown.

    Attributes:
        losses: Of each step.
        answers: How many answers generation was started after.
        ended: After how many of them it stopped.
        tokens: Tokens of a step.
        rows: Rows of a step.
        checkpoint_bytes: Size of the checkpoint that was written.
        peak_bytes: Largest memory during the steps: of the GPU, or of the whole process.
        logits: Last logits of the first document with the trained adapter and the original layers.
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
        """Returns the share of the first loss that is gone."""
        return 1 - self.losses[-1] / self.losses[0]


class StopWhenLearned(TrainerCallback):
    """Stops as soon as the batch is learned, with an evaluation and a checkpoint as at the end of a training."""

    def __init__(self, context: CheckContext, prompts: Sequence[list[int]], recorder: GradientRecorder) -> None:
        self.context, self.prompts, self.recorder, self.ended = context, prompts, recorder, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tests every few steps whether the loss has fallen and generation stops after every answer."""
        last = state.global_step == state.max_steps
        if not last and state.global_step % STEPS_BETWEEN_TESTS:
            return
        losses = self.recorder.losses
        self.ended = self._count_ended()
        if last or (losses[-1] <= losses[0] * (1 - FALL_BOUND) and self.ended == len(self.prompts)):
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def _count_ended(self) -> int:
        model, tokenizer, ends = self.context.model, self.context.tokenizer, sorted(self.context.end_tokens)
        answers = generate(model, tokenizer, self.prompts, max_new_tokens=1, batch_rows=1, ends=ends)
        return sum(answer.stopped for answer in answers)


def overfit_one_batch(context: CheckContext, rows: Dataset, heldout: Dataset | None) -> OverfitResult:
    """Repeats the largest batch until it is learned, evaluates, saves, and then restores the model.

    Args:
        context: Its trainer takes the steps.
        rows: data/train.
        heldout: data/heldout, or None.
    """
    train = context.job.config
    batch = largest_rows(rows, count=train.micro_batch_rows)
    evaluated = largest_rows(heldout, count=EVALUATED_ROWS) if heldout is not None and train.evaluates else []
    recorder = GradientRecorder(keeps_gradients=False)
    prompts = [] if OBJECTIVES[train.objective].compares else prompts_of(context, batch)
    stop = StopWhenLearned(context, prompts, recorder)
    trained = context.trainer.trained(
        batch,
        micro_batch=len(batch),
        steps=context.config.steps,
        recorder=recorder,
        callbacks=[stop],
        heldout=evaluated,
        checkpoints=1,
    )
    free_memory()
    on_gpu = context.device.startswith("cuda")
    with PeakMemory(context.folder / "memory.jsonl", stage="preflight") as peak, trained as work:
        checkpoint_bytes = sum(file.stat().st_size for file in (work / "checkpoints").rglob("*") if file.is_file())
        context.model.save_pretrained(context.folder / "adapter")
        logits = context.logits(adapter=True)
    return OverfitResult(
        losses=recorder.losses,
        answers=len(stop.prompts),
        ended=stop.ended,
        tokens=sum(sum(row["seq_lengths"]) for row in batch),
        rows=len(batch),
        checkpoint_bytes=checkpoint_bytes,
        peak_bytes=peak.device_bytes if on_gpu else peak.rss_bytes,
        logits=logits,
        adapter=context.folder / "adapter",
    )


def prompts_of(context: CheckContext, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Returns each document up to the end of turn of its last answer, without that token."""
    prompts: list[list[int]] = []
    for document in documents(rows)[:MAX_ANSWERS]:
        ids = document["input_ids"]
        last = max((place for place, label in enumerate(document["labels"]) if label != IGNORED), default=0)
        near = range(max(1, last - 1), min(last + 2, len(ids)))
        ends = [place for place in near if ids[place] in context.end_tokens]
        if ends:  # a truncated text has none
            prompts.append(ids[: ends[-1]])
    return prompts
