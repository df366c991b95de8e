"""What happens beside the steps: the record, the progress line, the checkpoints, the stop on a signal or without progress."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from finetune.console import ProgressBar, human_bytes, log
from finetune.errors import Interrupted
from finetune.memory import device_bytes, rss_bytes
from finetune.train.checkpoints import TrainingFingerprint, commit, is_complete, path_of, prune

if TYPE_CHECKING:
    from finetune.launch.ranks import Ranks
    from finetune.tracking import Trackers
    from finetune.train.progress import TrainingProgress

NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "eval_loss": "eval/loss",
}
"""transformers' names to ours."""


class MetricsLogger(TrainerCallback):
    """Appends every logged figure to metrics.jsonl, sends it to the trackers, and takes the time."""

    def __init__(self, file: Path, *, progress: TrainingProgress, trackers: Trackers) -> None:
        self.file, self.progress, self.trackers = file, progress, trackers
        self.started, self.before = time.monotonic(), progress.seconds
        self.last = (self.started, progress.tokens)
        self.skipped = progress.skipped

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.before = time.monotonic(), self.progress.seconds
        self.last = (self.started, self.progress.tokens)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.seconds = round(self.before + time.monotonic() - self.started, 3)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        line: dict[str, float] = {
            NAMES.get(key, key): float(v) for key, v in (logs or {}).items() if key in NAMES or "/" in key
        }
        if not line:
            return
        if "train/loss" in line:
            now, tokens = time.monotonic(), self.progress.tokens
            line["train/tokens_per_second"] = round((tokens - self.last[1]) / max(now - self.last[0], 1e-9), 1)
            self.last = (now, tokens)
            if self.progress.skipped != self.skipped:  # a mean over steps that were left out is no loss of this model
                del line["train/loss"]
                self.skipped = self.progress.skipped
            line["train/skipped_steps"] = self.progress.skipped
        line = {name: value for name, value in line.items() if math.isfinite(value)}
        line["memory/rss_bytes"], line["memory/device_bytes"] = rss_bytes(), device_bytes()
        self._append(state.global_step, line)
        self.trackers.log(state.global_step, line)

    def _append(self, step: int, figures: dict[str, float]) -> None:
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "time": round(time.time(), 2), **figures}) + "\n")


class CheckpointSealer(TrainerCallback):
    """Seals each checkpoint that transformers has written, then deletes what the rule no longer keeps."""

    def __init__(
        self, progress: TrainingProgress, *, fingerprint: TrainingFingerprint, keep: int, keep_best: bool, ranks: Ranks
    ) -> None:
        self.progress, self.fingerprint, self.keep, self.keep_best, self.ranks = (
            progress,
            fingerprint,
            keep,
            keep_best,
            ranks,
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ranks.barrier()  # each process has written its own state of random numbers
        if self.ranks.is_main:
            folder = Path(args.output_dir)
            commit(path_of(folder, state.global_step), self.fingerprint, progress=self.progress)
            prune(folder, keep=self.keep, best_step=self.progress.best_step if self.keep_best else 0)
        self.ranks.barrier()  # and none looks for a seal before it is there


class EarlyStopping(TrainerCallback):
    """Remembers the evaluation with the lowest held-out loss, and stops when ``patience`` others came after it."""

    def __init__(self, progress: TrainingProgress, *, patience: int | None, keep_best: bool) -> None:
        self.progress, self.patience, self.keep_best = progress, patience, keep_best

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is None:
            return
        progress = self.progress
        progress.evaluations += 1
        if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step, progress.waited = loss, state.global_step, 0
            control.should_save = control.should_save or self.keep_best  # the best weights must outlive this process
            return
        progress.waited += 1
        if self.patience is not None and progress.waited >= self.patience and state.global_step < state.max_steps:
            progress.stopped_early = control.should_training_stop = control.should_save = True
            best = (
                f"{progress.best_loss:.4f} of step {progress.best_step}"
                if progress.best_loss is not None
                else "any number"
            )
            log(
                "train",
                f"stops at step {state.global_step}: {progress.waited} evaluations in a row were no better than {best}",
            )


class SaveOnSignal(TrainerCallback):
    """TERM or INT: finish the step, write a checkpoint, stop. A second signal stops at once.

    Listens from entering to leaving it as a context; a signal that comes before the first step waits for its end.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}
        self.ranks = ranks

    def __enter__(self) -> SaveOnSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.ranks.count == 1:  # several get one signal from the terminal and one from their launcher
            signal.signal(number, self.before[number])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.ranks.any_rank(self.received is not None):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.ranks.any_rank(self.received is not None) and is_complete(
            path_of(Path(args.output_dir), state.global_step)
        ):
            name = signal.Signals(self.received or signal.SIGTERM).name
            raise Interrupted(
                f"train: stopped by {name} after step {state.global_step}, which is saved; go on with run.if_exists=resume"
            )


class ProgressLine(TrainerCallback):
    """One live line: step, loss, tokens per second, trained share, memory, time left."""

    def __init__(self, progress: TrainingProgress) -> None:
        self.progress = progress
        self.bar: ProgressBar | None = None
        self.started, self.before = 0.0, 0
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.before = time.monotonic(), self.progress.tokens
        self.bar = ProgressBar("train", total=state.max_steps, unit="steps", done=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.3f}"
        if logs and "eval_loss" in logs:
            self.shown["held-out"] = f"{logs['eval_loss']:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        self.shown["tokens/s"] = f"{(self.progress.tokens - self.before) / seconds:.0f}"
        self.shown["trained"] = f"{self.progress.trained / max(self.progress.tokens, 1):.0%}"
        self.shown["memory"] = human_bytes(device_bytes() or rss_bytes())
        if self.bar is not None:
            note = ", ".join(f"{name} {value}" for name, value in self.shown.items())
            self.bar.move_to(state.global_step, note=note)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the line, also where training does not come to its end."""
        if self.bar is not None:
            self.bar.close()
