"""Sends every figure to the trackers of a run. A failing tracker is reported once and counted; the run continues."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from finetune.console import log
from finetune.launch.config import is_first_process
from finetune.tracking.config import TrackerConfig

Figures = Mapping[str, float]


class TrackerError(Exception):
    """A service cannot be reached or refuses a call. Never ends a run."""


class Tracker(Protocol):
    """Receives a run's figures. Every method may raise `TrackerError`; a service is called from another thread."""

    name: str
    is_service: bool

    def start(self, *, run_name: str, run_config: dict[str, Any], folder: Path) -> None:
        """Starts tracking; called once, first. ``folder`` is the run's ``tracking/``, for the tracker's own files."""

    def log(self, step: int, metrics: Figures) -> None:
        """Receives figures of an optimizer step. After a resumption, steps may repeat."""

    def summary(self, metrics: Figures) -> None:
        """Receives figures of the whole run, e.g. ``eval/merged/perplexity``."""

    def artifact(self, path: Path, *, name: str, kind: str) -> None:
        """Receives a file or folder of the run."""

    def finish(self) -> None:
        """Ends tracking; called once, last, also after a failure of the run."""


Call = Callable[[Tracker], None]


class Trackers:
    """Forwards each call to all trackers of a run.

    Attributes:
        missed: Number of failed calls, by tracker.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.missed: dict[str, int] = {}
        self._trackers = [AsyncTracker(tracker, self.missed) for tracker in trackers]
        self._finished = False

    def start(self, *, run_name: str, run_config: dict[str, Any], folder: Path) -> None:
        """Starts each tracker, a service at its first figure; one that fails to start gets no more calls."""
        for tracker in self._trackers:
            tracker.start(lambda inner: inner.start(run_name=run_name, run_config=run_config, folder=folder))

    def log(self, step: int, metrics: Figures) -> None:
        """Sends figures of an optimizer step, NaN and infinities included."""
        self._each(lambda tracker: tracker.log(step, metrics))

    def summary(self, metrics: Figures) -> None:
        """Sends figures of the whole run."""
        self._each(lambda tracker: tracker.summary(metrics))

    def artifact(self, path: Path, *, name: str, kind: str) -> None:
        """Sends a file or folder."""
        self._each(lambda tracker: tracker.artifact(path, name=name, kind=kind))

    def finish(self) -> None:
        """Waits until everything is sent and closes all trackers; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._each(lambda tracker: tracker.finish())
        for tracker in self._trackers:
            tracker.close()
        for name, count in self.missed.items():
            calls = "1 call" if count == 1 else f"{count} calls"
            log("tracking", f"{name}: {calls} failed; tracking/metrics.jsonl has every figure")

    def _each(self, call: Call) -> None:
        for tracker in self._trackers:
            tracker.put(call)


class AsyncTracker:
    """Makes one tracker's calls in order: those of a service in its own thread, which starts with the first figure.

    Importing and starting W&B takes a second; neither that nor a slow response should delay a step.

    Args:
        tracker: The tracker to call.
        missed: Counts the failed calls, by name.
    """

    def __init__(self, tracker: Tracker, missed: dict[str, int]) -> None:
        self.tracker, self.missed = tracker, missed
        self.thread = ThreadPoolExecutor(max_workers=1) if tracker.is_service else None
        self.start_call: Call | None = None
        self.has_failed_to_start = False

    def start(self, call: Call) -> None:
        """Makes the first call: at once, or for a service before its first figure."""
        if self.thread is None:
            self._start(call)
        else:
            self.start_call = call

    def put(self, call: Call) -> None:
        """Makes a call, or queues it for a service."""
        if self.thread is None:
            self._send(call)
            return
        start_call, self.start_call = self.start_call, None
        if start_call:
            self.thread.submit(self._start, start_call)
        self.thread.submit(self._send, call)

    def close(self) -> None:
        """Waits for the queued calls."""
        if self.thread:
            self.thread.shutdown(wait=True)

    def _start(self, call: Call) -> None:
        self._send(call)
        self.has_failed_to_start = self.tracker.name in self.missed

    def _send(self, call: Call) -> None:
        if self.has_failed_to_start:
            return
        try:
            call(self.tracker)
        except TrackerError as error:
            if self.tracker.name not in self.missed:
                log("tracking", f"{self.tracker.name}: {error}; the run continues without it")
            self.missed[self.tracker.name] = self.missed.get(self.tracker.name, 0) + 1


class JsonLines:
    """Writes tracking/metrics.jsonl, one line per call; always on, so that no figure depends on a service."""

    name, is_service = "jsonl", False

    def start(self, *, run_name: str, run_config: dict[str, Any], folder: Path) -> None:
        self.file = folder / "metrics.jsonl"

    def log(self, step: int, metrics: Figures) -> None:
        self._append({"step": step, **metrics})

    def summary(self, metrics: Figures) -> None:
        self._append({"summary": dict(metrics)})

    def artifact(self, path: Path, *, name: str, kind: str) -> None:
        self._append({"artifact": name, "kind": kind, "path": os.path.relpath(path, self.file.parent.parent)})

    def finish(self) -> None:
        return

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")


def open_trackers(
    config: Mapping[str, TrackerConfig], *, run_name: str, folder: Path, run_config: dict[str, Any]
) -> Trackers:
    """Starts the configured trackers. Of several processes, only the first one tracks.

    Args:
        config: The tracking group.
        run_name: ``run.name``.
        folder: The run folder; trackers keep their files in ``folder/tracking``.
        run_config: The composed configuration, sent unchanged.
    """
    if not is_first_process():
        return Trackers([])
    tracking_folder = folder / "tracking"
    tracking_folder.mkdir(parents=True, exist_ok=True)
    trackers = Trackers([JsonLines(), *filter(None, map(_make, config.values()))])
    trackers.start(run_name=run_name, run_config=run_config, folder=tracking_folder)
    return trackers


def _make(config: TrackerConfig) -> Tracker | None:
    """Returns the tracker; None for W&B where nobody is logged in and nobody asked for its files."""
    if config.kind == "tensorboard":
        from finetune.tracking.tensorboard import TensorBoard

        return TensorBoard(config)
    if config.kind != "wandb":
        from finetune.tracking.services import Service

        return Service(config)
    from finetune.tracking.wandb import WeightsAndBiases, choose_mode

    mode, reason = choose_mode(config.mode)
    if mode != "off":
        return WeightsAndBiases(config)
    log("tracking", f"wandb: off, because {reason}; tracking.wandb.mode=offline writes its files for a later sync")
    return None
