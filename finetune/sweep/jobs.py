"""A job's folder is a run folder with ``job.json`` in it: what was changed, how far it came, and why not further."""

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
from finetune.run import write_json

FINAL = ("done", "pruned")
"""States that the same command leaves as they are; ``failed`` and ``interrupted`` are tried again."""

LOCK = ".job.lock"
LONGEST_VALUE = 24
HASH_LETTERS = 6


@dataclass(kw_only=True, slots=True)
class Job:
    """One job of a sweep.

    Attributes:
        folder: Its run folder, ``<run.root>/<sweep.name>/<job>``.
        changed: The swept settings and this job's values, as typed.
        number: Hydra's, in the order of the sweep.
        state: ``new``, ``running``, ``done``, ``failed``, ``pruned`` or ``interrupted``.
        reason: Why it is neither new nor running nor done, in one line.
        seconds: Spent on it, all attempts together.
    """

    folder: Path
    changed: dict[str, str]
    number: int = 0
    state: str = "new"
    reason: str = ""
    seconds: float = 0.0

    @property
    def file(self) -> Path:
        return self.folder / "job.json"

    @property
    def title(self) -> str:
        return " ".join(f"{key.lstrip('+')}={value}" for key, value in self.changed.items())

    @classmethod
    def of(cls, sweep: Path, changed: Mapping[str, str], *, number: int = 0) -> Job:
        """The job of these values: as its folder knows it, or new. The name is made from the values, so that any order finds it."""
        folder = sweep / name_of(changed)
        return (
            cls.read(folder / "job.json")
            if (folder / "job.json").is_file()
            else cls(folder=folder, changed=dict(changed), number=number)
        )

    @classmethod
    def read(cls, file: Path) -> Job:
        return cls(folder=file.parent, **json.loads(file.read_text(encoding="utf-8")))

    def write(self) -> None:
        """Atomically: whoever looks at the sweep meanwhile sees the old state or the new."""
        write_json(
            self.file, {name: getattr(self, name) for name in ("changed", "number", "state", "reason", "seconds")}
        )

    def losses(self) -> dict[int, float]:
        """Held-out losses that training has taken so far, in nats a trained token, by optimizer step."""
        file = self.folder / "train" / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        found = [row for row in map(_parsed, lines) if "eval/loss" in row]
        return {row["step"]: row["eval/loss"] for row in found}

    def held_out(self) -> dict[str, float]:
        """``loss``, and ``low`` and ``high`` where the evaluation stage has measured it; otherwise the last that training took.

        Empty where none was taken. Of several artifacts it is the adapter on the base that was trained: what a sweep changes.
        """
        manifest = self.folder / "eval" / "manifest.json"
        artifacts = (
            json.loads(manifest.read_text(encoding="utf-8"))["product"]["artifacts"] if manifest.is_file() else {}
        )
        measured = artifacts.get("adapter") or artifacts.get("merged")
        if measured:
            return {"loss": measured["loss"], "low": measured["loss_low"], "high": measured["loss_high"]}
        losses = self.losses()
        return {"loss": losses[max(losses)]} if losses else {}

    def cost(self) -> dict[str, Any]:
        """``tokens_per_second`` of training, and ``peak_bytes``: of the device where there is one, of the process otherwise."""
        manifests = [
            json.loads(file.read_text(encoding="utf-8")) for file in sorted(self.folder.glob("*/manifest.json"))
        ]
        training: dict[str, Any] = next((one["product"] for one in manifests if one["stage"] == "train"), {})
        peaks = [one.get("peak_device_bytes") or one.get("peak_rss_bytes") or 0 for one in manifests]
        return {"tokens_per_second": training.get("tokens_per_second"), "peak_bytes": max(peaks, default=0) or None}


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Waits until no other process works on a job, then holds it.

    Yields:
        The lock's file descriptor. A process that inherits it holds the job too, so that a run whose sweep was killed is waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as handle:
        if not _take(handle.fileno()):
            log("sweep", f"{folder.name}: another process works on it; this one waits")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def jobs_in(sweep: Path) -> list[Job]:
    """All jobs that a sweep has begun, in its order. One that says it runs and is held by nobody was interrupted."""
    jobs = sorted((Job.read(file) for file in sweep.glob("*/job.json")), key=lambda job: (job.number, job.folder.name))
    for job in jobs:
        with open(job.folder / LOCK, "a") as handle:
            if job.state == "running" and _take(handle.fileno()):
                job.state, job.reason = "interrupted", "it was killed; the same command continues"
    return jobs


def _take(descriptor: int) -> bool:
    """Whether a lock was free; it is taken then."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def name_of(changed: Mapping[str, str]) -> str:
    """``{"lora.rank": "8"}`` -> ``lora.rank-8``: a folder name that needs no quotes in a shell or an override."""
    return "_".join(f"{key.lstrip('+')}-{_short(value)}" for key, value in changed.items()).replace("/", ".")


def _short(value: str) -> str:
    safe = re.sub(r"[^\w.+-]+", "-", value, flags=re.ASCII).strip("-")
    if safe == value and len(value) <= LONGEST_VALUE:
        return value
    return f"{safe[:LONGEST_VALUE]}-{hashlib.sha256(value.encode()).hexdigest()[:HASH_LETTERS]}"


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the line that is being written, or that a killed process left unfinished
        return {}
