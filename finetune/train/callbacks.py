"""What happens beside the steps: the record, the progress line, the stop on a signal, the stop on divergence."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import TrainerCallback

from finetune.console import human_bytes
from finetune.errors import Interrupted, TrainError
from finetune.memory import device_bytes, rss_bytes

if TYPE_CHECKING:
    from finetune.tracking import Trackers
    from finetune.train.counts import Counts

NAMES = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate", "eval_loss": "eval/loss"}
"""transformers' names to ours."""


class Record(TrainerCallback):
    """Appends every logged figure to metrics.jsonl and sends it to the trackers."""

    def __init__(self, file: Path, *, counts: Counts, trackers: Trackers) -> None:
        self.file, self.counts, self.trackers = file, counts, trackers
        self.started = time.monotonic()
        self.last = (self.started, counts.tokens)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.monotonic()
        self.last = (self.started, self.counts.tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        line: dict[str, float] = {NAMES[key]: float(value) for key, value in (logs or {}).items() if key in NAMES}
        if not line:
            return
        if "train/loss" in line:
            now, tokens = time.monotonic(), self.counts.tokens
            line["train/tokens_per_second"] = round((tokens - self.last[1]) / max(now - self.last[0], 1e-9), 1)
            self.last = (now, tokens)
        line["memory/rss_bytes"], line["memory/device_bytes"] = rss_bytes(), device_bytes()
        self._append(state.global_step, line)
        self.trackers.log(state.global_step, line)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """With a checkpoint goes how much had been read, so that a resumed run counts on."""
        seconds = self.counts.seconds + time.monotonic() - self.started
        counts = {"train/tokens": self.counts.tokens, "train/trained_tokens": self.counts.trained, "train/seconds": round(seconds, 3)}
        self._append(state.global_step, counts)

    def _append(self, step: int, figures: dict[str, float]) -> None:
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "time": round(time.time(), 2), **figures}) + "\n")


class Divergence(TrainerCallback):
    """Stops a run whose loss or gradient is no number: every later step would be wasted."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise TrainError(
                    f"train: {name} is {value} at step {state.global_step}; the last checkpoint is kept. Likely causes: "
                    "optim.learning_rate is too high, model.dtype=float16 overflows, or a row trains no token"
                )


class SaveOnSignal(TrainerCallback):
    """TERM or INT: finish the step, write a checkpoint, stop. A second signal stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self.before[number])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received is not None and state.global_step < state.max_steps:
            name = signal.Signals(self.received).name
            raise Interrupted(f"train: stopped by {name} after step {state.global_step}, which is saved; go on with run.if_exists=resume")


class Progress(TrainerCallback):
    """One live line: step, loss, tokens per second, trained share, memory, time left."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.bar: Any = None
        self.started, self.before = 0.0, 0
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.before = time.monotonic(), self.counts.tokens
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", file=sys.stderr, dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.3f}"
        if logs and "eval_loss" in logs:
            self.shown["held-out"] = f"{logs['eval_loss']:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        self.shown["tokens/s"] = f"{(self.counts.tokens - self.before) / seconds:.0f}"
        self.shown["trained"] = f"{self.counts.trained / max(self.counts.tokens, 1):.0%}"
        self.shown["memory"] = human_bytes(device_bytes() or rss_bytes())
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
