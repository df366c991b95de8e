"""Fans every figure out to the trackers of a run. A tracker that fails is said once and counted; the run goes on."""

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
    """A service cannot be reached or refuses. Never ends a run."""


class Tracker(Protocol):
    """What receives a run's figures. Every method may raise `TrackerError`; a service is called from another thread."""

    name: str
    is_service: bool

    def start(self, *, run_name: str, run_config: dict[str, Any], folder: Path) -> None:
        """Called once, first. ``folder`` is the run's ``tracking/``, where the tracker may keep files."""

    def log(self, step: int, metrics: Figures) -> None:
        """Figures at an optimizer step. After a resumption, steps may come again."""

    def summary(self, metrics: Figures) -> None:
        """Figures of the whole run, e.g. ``eval/merged/perplexity``."""

    def artifact(self, path: Path, *, name: str, kind: str) -> None:
        """A file or folder of the run."""

    def finish(self) -> None:
        """Called once, last, also after a failure of the run."""


Call = Callable[[Tracker], None]


class Trackers:
    """All trackers of a run, as one.

    Attributes:
        missed: By tracker, the calls that did not arrive.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.missed: dict[str, int] = {}
        self._lanes = [Lane(tracker, self.missed) for tracker in trackers]
        self._finished = False

    def start(self, *, run_name: str, run_config: dict[str, Any], folder: Path) -> None:
        """Starts each, a service when its first figure comes; one that cannot start is left out from then on."""
        for lane in self._lanes:
            lane.start(lambda tracker: tracker.start(run_name=run_name, run_config=run_config, folder=folder))

    def log(self, step: int, metrics: Figures) -> None:
        """Sends figures at an optimizer step; NaN and infinities go out as they are."""
        self._each(lambda tracker: tracker.log(step, metrics))

    def summary(self, metrics: Figures) -> None:
        """Sends figures of the whole run."""
        self._each(lambda tracker: tracker.summary(metrics))

    def artifact(self, path: Path, *, name: str, kind: str) -> None:
        """Sends a file or folder."""
        self._each(lambda tracker: tracker.artifact(path, name=name, kind=kind))

    def finish(self) -> None:
        """Waits until everything went out and closes all; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._each(lambda tracker: tracker.finish())
        for lane in self._lanes:
            lane.close()
        for name, count in self.missed.items():
            log(
                "tracking",
                f"{name}: {count} {'call' if count == 1 else 'calls'} did not arrive; tracking/metrics.jsonl has every figure",
            )

    def _each(self, call: Call) -> None:
        for lane in self._lanes:
            lane.put(call)


class Lane:
    """One tracker's calls in their order: a service's on a thread of its own, which begins with the first figure.

    Importing and starting W&B takes a second; neither that nor a slow answer should hold up a step.

    Args:
        tracker: Who is called.
        missed: Counts the calls that did not arrive, by name.
    """

    def __init__(self, tracker: Tracker, missed: dict[str, int]) -> None:
        self.tracker, self.missed = tracker, missed
        self.thread = ThreadPoolExecutor(max_workers=1) if tracker.is_service else None
        self.opening: Call | None = None
        self.is_out = False

    def start(self, call: Call) -> None:
        if self.thread is None:
            self._open(call)
        else:
            self.opening = call

    def put(self, call: Call) -> None:
        if self.thread is None:
            self._send(call)
            return
        opening, self.opening = self.opening, None
        if opening:
            self.thread.submit(self._open, opening)
        self.thread.submit(self._send, call)

    def close(self) -> None:
        if self.thread:
            self.thread.shutdown(wait=True)

    def _open(self, call: Call) -> None:
        self._send(call)
        self.is_out = self.tracker.name in self.missed

    def _send(self, call: Call) -> None:
        if self.is_out:
            return
        try:
            call(self.tracker)
        except TrackerError as error:
            if self.tracker.name not in self.missed:
                log("tracking", f"{self.tracker.name}: {error}; the run goes on without it")
            self.missed[self.tracker.name] = self.missed.get(self.tracker.name, 0) + 1


class JsonLines:
    """tracking/metrics.jsonl: one line a call, always on, so that no figure depends on a service."""

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
    """Starts the chosen trackers. Of several processes, only the first one tracks.

    Args:
        config: The tracking group.
        run_name: ``run.name``.
        folder: The run folder; trackers keep their files in ``folder/tracking``.
        run_config: The composed configuration, sent as it is.
    """
    if not is_first_process():
        return Trackers([])
    own = folder / "tracking"
    own.mkdir(parents=True, exist_ok=True)
    trackers = Trackers([JsonLines(), *[_make(one) for one in config.values()]])
    trackers.start(run_name=run_name, run_config=run_config, folder=own)
    return trackers


def _make(config: TrackerConfig) -> Tracker:
    if config.kind == "tensorboard":
        from finetune.tracking.tensorboard import TensorBoard

        return TensorBoard(config)
    from finetune.tracking.wandb import WeightsAndBiases

    return WeightsAndBiases(config)
