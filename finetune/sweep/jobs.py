"""Reads and writes jobs. A job's folder is a run folder with ``job.json``: the changed settings, state and reason."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.console import log
from finetune.files import read_json
from finetune.run import write_json

FINAL = ("done", "pruned")
"""States that the same command does not run again; it retries ``failed`` and continues ``interrupted``."""

LOCK = ".job.lock"
LONGEST_VALUE = 24
HASH_LETTERS = 6


@dataclass(kw_only=True, slots=True)
class Job:
    """One job of a sweep.

    Attributes:
        folder: Its run folder, ``<run.root>/<sweep.name>/<job>``.
        changed: The swept settings with this job's values, as typed.
        number: Hydra's number of the job, in the order of the sweep.
        state: ``new``, ``running``, ``done``, ``failed``, ``pruned`` or ``interrupted``.
        reason: Why it failed, was pruned or was interrupted, in one line.
        seconds: Time of all attempts together.
    """

    folder: Path
    changed: dict[str, str]
    number: int = 0
    state: str = "new"
    reason: str = ""
    seconds: float = 0.0

    @property
    def file(self) -> Path:
        """Returns the path of job.json."""
        return self.folder / "job.json"

    @property
    def title(self) -> str:
        """Returns the changed settings, for messages."""
        return " ".join(f"{key.lstrip('+')}={value}" for key, value in self.changed.items())

    @classmethod
    def of(cls, sweep: Path, changed: Mapping[str, str], *, number: int = 0) -> Job:
        """Returns the job of these values: from its folder, or a new one. Its name is made from the values."""
        job = cls(folder=sweep / job_name(changed), changed=dict(changed), number=number)
        return cls.read(job.file) if job.file.is_file() else job

    @classmethod
    def read(cls, file: Path) -> Job:
        """Reads job.json."""
        return cls(folder=file.parent, **read_json(file, dict))

    def write(self) -> None:
        """Writes job.json atomically."""
        names = ("changed", "number", "state", "reason", "seconds")
        write_json(self.file, {name: getattr(self, name) for name in names})

    def losses(self) -> dict[int, float]:
        """Returns the held-out losses measured in training so far, in nats per trained token, by optimizer step."""
        file = self.folder / "train" / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        rows = [row for row in map(_parse, lines) if "eval/loss" in row]
        return {row["step"]: row["eval/loss"] for row in rows}

    def held_out(self) -> dict[str, float]:
        """Returns ``loss``, with ``low`` and ``high`` if the evaluation stage measured it, or the last one of training.

        The loss is that of the adapter on the base that it was trained on. Empty if none was measured.
        """
        manifest = self.folder / "eval" / "manifest.json"
        if manifest.is_file():
            artifacts = read_json(manifest, dict)["product"]["artifacts"]
            measured = artifacts.get("adapter") or artifacts.get("merged")
            if measured:
                return {"loss": measured["loss"], "low": measured["loss_low"], "high": measured["loss_high"]}
        losses = self.losses()
        return {"loss": losses[max(losses)]} if losses else {}

    def cost(self) -> dict[str, Any]:
        """Returns ``tokens_per_second`` of training and ``peak_bytes``, of the device or else of the process."""
        files = sorted(self.folder.glob("*/manifest.json"))
        manifests = [read_json(file, dict) for file in files]
        training: dict[str, Any] = next((item["product"] for item in manifests if item["stage"] == "train"), {})
        peaks = [item.get("peak_device_bytes") or item.get("peak_rss_bytes") or 0 for item in manifests]
        return {"tokens_per_second": training.get("tokens_per_second"), "peak_bytes": max(peaks, default=0) or None}


@contextmanager
def job_lock(folder: Path) -> Iterator[int]:
    """Waits until no other process works on a job, then locks it.

    Yields:
        The lock's file descriptor. A process that inherits it keeps the lock, also when the sweep is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as handle:
        if not _take(handle.fileno()):
            log("sweep", f"{folder.name}: waiting for another process that works on it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def jobs_in(sweep: Path) -> list[Job]:
    """Returns all jobs that a sweep has started, in its order. A running job that no process holds was interrupted."""
    jobs = sorted((Job.read(file) for file in sweep.glob("*/job.json")), key=lambda job: (job.number, job.folder.name))
    for job in jobs:
        with open(job.folder / LOCK, "a") as handle:
            if job.state == "running" and _take(handle.fileno()):
                job.state, job.reason = "interrupted", "it was killed; the same command continues"
    return jobs


def _take(descriptor: int) -> bool:
    """Takes a lock if it is free, and returns whether it was."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def job_name(changed: Mapping[str, str]) -> str:
    """Returns ``lora.rank-8`` for ``{"lora.rank": "8"}``: a folder name that needs no quotes in a shell."""
    return "_".join(f"{key.lstrip('+')}-{_short(value)}" for key, value in changed.items()).replace("/", ".")


def _short(value: str) -> str:
    safe = re.sub(r"[^\w.+-]+", "-", value, flags=re.ASCII).strip("-")
    if safe == value and len(value) <= LONGEST_VALUE:
        return value
    return f"{safe[:LONGEST_VALUE]}-{hashlib.sha256(value.encode()).hexdigest()[:HASH_LETTERS]}"


def _parse(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # an incomplete last line
        return {}
