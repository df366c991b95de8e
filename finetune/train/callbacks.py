"""Callbacks of the training loop: metrics, progress line, checkpoints, early stopping and signals."""

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
"""Names of transformers' metrics in metrics.jsonl."""


class MetricsLogger(TrainerCallback):
    """Appends every logged metric to metrics.jsonl, sends it to the trackers, and measures the training time."""

    def __init__(self, file: Path, *, progress: TrainingProgress, trackers: Trackers) -> None:
        self.file, self.progress, self.trackers = file, progress, trackers
        self.started, self.seconds_before = time.monotonic(), progress.seconds
        self.last_time, self.last_tokens, self.last_skipped = self.started, progress.tokens, progress.skipped

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.seconds_before = time.monotonic(), self.progress.seconds
        self.last_time, self.last_tokens = self.started, self.progress.tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.seconds = round(self.seconds_before + time.monotonic() - self.started, 3)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        metrics: dict[str, float] = {
            NAMES.get(key, key): float(value) for key, value in (logs or {}).items() if key in NAMES or "/" in key
        }
        if not metrics:
            return
        if "train/loss" in metrics:
            now, tokens = time.monotonic(), self.progress.tokens
            metrics["train/tokens_per_second"] = round((tokens - self.last_tokens) / max(now - self.last_time, 1e-9), 1)
            self.last_time, self.last_tokens = now, tokens
            if self.progress.skipped != self.last_skipped:  # the mean would include the zeros of skipped steps
                del metrics["train/loss"]
                self.last_skipped = self.progress.skipped
            metrics["train/skipped_steps"] = self.progress.skipped
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        metrics["memory/rss_bytes"], metrics["memory/device_bytes"] = rss_bytes(), device_bytes()
        self._append(state.global_step, metrics)
        self.trackers.log(state.global_step, metrics)

    def _append(self, step: int, metrics: dict[str, float]) -> None:
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "time": round(time.time(), 2), **metrics}) + "\n")


class CheckpointSealer(TrainerCallback):
    """Commits each checkpoint that transformers has written, then deletes those that are no longer kept."""

    def __init__(
        self, progress: TrainingProgress, *, fingerprint: TrainingFingerprint, keep: int, keep_best: bool, ranks: Ranks
    ) -> None:
        self.progress, self.fingerprint, self.ranks = progress, fingerprint, ranks
        self.keep, self.keep_best = keep, keep_best

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ranks.barrier()  # each process has written the state of its random generators
        if self.ranks.is_main:
            folder = Path(args.output_dir)
            commit(path_of(folder, state.global_step), self.fingerprint, progress=self.progress)
            prune(folder, keep=self.keep, best_step=self.progress.best_step if self.keep_best else 0)
        self.ranks.barrier()  # the seal exists before any process checks for it


class EarlyStopping(TrainerCallback):
    """Remembers the evaluation with the lowest held-out loss; stops after ``patience`` later ones."""

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
            control.should_save = control.should_save or self.keep_best  # a killed run must not lose the best weights
            return
        progress.waited += 1
        if self.patience is not None and progress.waited >= self.patience and state.global_step < state.max_steps:
            progress.stopped_early = control.should_training_stop = control.should_save = True
            reason = "was finite"
            if progress.best_loss is not None:
                reason = f"was lower than {progress.best_loss:.4f} of step {progress.best_step}"
            log(
                "train",
                f"stops early at step {state.global_step}: none of the last {progress.waited} held-out losses {reason}",
            )


class SaveOnSignal(TrainerCallback):
    """Finishes the step, writes a checkpoint and stops on TERM or INT; a second signal stops at once.

    It handles signals while it is open as a context; a signal before the first step takes effect after that step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.received: int | None = None
        self.handlers: dict[int, Any] = {}
        self.ranks = ranks

    def __enter__(self) -> SaveOnSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.ranks.count == 1:  # several processes get one signal from the terminal and one from their launcher
            signal.signal(number, self.handlers[number])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.ranks.any_rank(self.received is not None):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        received = self.ranks.any_rank(self.received is not None)
        if received and is_complete(path_of(Path(args.output_dir), state.global_step)):
            name = signal.Signals(self.received or signal.SIGTERM).name
            raise Interrupted(
                f"train: stopped by {name} after step {state.global_step}, which is saved; "
                "continue with run.if_exists=resume"
            )


class ProgressLine(TrainerCallback):
    """A progress bar with loss, tokens per second, the share of tokens trained on, memory and time left."""

    def __init__(self, progress: TrainingProgress) -> None:
        self.progress = progress
        self.bar: ProgressBar | None = None
        self.started, self.tokens_before = 0.0, 0
        self.notes: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.tokens_before = time.monotonic(), self.progress.tokens
        self.bar = ProgressBar("train", total=state.max_steps, unit="steps", done=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "train/reward" in logs:
            self.notes["reward"] = f"{logs['train/reward']:.3f}"
        elif logs and "loss" in logs:
            self.notes["loss"] = f"{logs['loss']:.3f}"
        if logs and "eval/reward" in logs:
            self.notes["held-out"] = f"{logs['eval/reward']:.3f}"
        if logs and "eval_loss" in logs:
            self.notes["held-out"] = f"{logs['eval_loss']:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        self.notes["tokens/s"] = f"{(self.progress.tokens - self.tokens_before) / seconds:.0f}"
        self.notes["trained"] = f"{self.progress.trained / max(self.progress.tokens, 1):.0%}"
        self.notes["memory"] = human_bytes(device_bytes() or rss_bytes())
        if self.bar is not None:
            self.bar.move_to(state.global_step, note=", ".join(f"{name} {note}" for name, note in self.notes.items()))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the bar; needed where training is aborted."""
        if self.bar is not None:
            self.bar.close()
