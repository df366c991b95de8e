"""One job of a sweep: a process of its own, followed to its end. Hydra's launchers call this, here or on another machine."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.console import log
from finetune.errors import EXIT_INTERRUPTED
from finetune.sweep.config import SweepConfig
from finetune.sweep.jobs import FINAL, Job, alone, jobs_in, name_of
from finetune.sweep.median import behind

LOOK_SECONDS = 1.0
"""How often a job that may be stopped is looked at."""

BEGINS = {"new": "starts", "failed": "is tried again"}
LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What all jobs share; launchers carry it to other machines.

    Attributes:
        folder: ``<run.root>/<sweep.name>``.
        fixed: Keys of the settings that no job changes.
        config: The sweep group.
    """

    folder: Path
    fixed: frozenset[str]
    config: SweepConfig

    def do(self, overrides: Sequence[str], *, number: int) -> float:
        """Does a job, unless it is done already.

        Args:
            overrides: All of the job's, as Hydra's sweeper made them.
            number: The sweeper's.

        Returns:
            Its held-out loss, for a sweeper to minimize; nan where it failed or took none.
        """
        pairs = (override.partition("=")[::2] for override in overrides)
        changed = {key: value for key, value in pairs if key not in self.fixed}
        with alone(self.folder / name_of(changed)) as lock:
            job = Job.of(self.folder, changed, number=number)
            before = job.state in FINAL
            if not before:
                self._run(job, overrides, lock=lock)
        loss = job.held_out().get("loss", math.nan)
        how = f"{job.state} before" if before else f"{job.state} after {job.seconds:.0f} s"
        reason = f": {job.reason}" if job.reason else ""
        log("sweep", f"{job.title}: {how}{reason}" + ("" if math.isnan(loss) else f"; held-out loss {loss:.4f}"))
        return math.nan if job.state == "failed" else loss

    def _run(self, job: Job, overrides: Sequence[str], *, lock: int) -> None:
        log_file = job.folder / "log.txt"
        log("sweep", f"{job.title}: {BEGINS.get(job.state, 'goes on')}")
        # What is said last counts, so these stand behind the user's own.
        own = [
            f"run.root={self.folder}",
            f"run.name={job.folder.name}",
            f"sweep.name={self.folder.name}",
            "run.if_exists=resume",
        ]
        begun, spent = time.monotonic(), job.seconds
        job.state, job.reason = "running", ""
        job.write()
        with open(log_file, "ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "finetune", *overrides, *own],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip
        try:
            given_up = self._follow(process, job)
            said = log_file.read_bytes()[start:].decode(errors="replace")
            job.state, job.reason = ("pruned", given_up) if given_up else outcome(process.returncode, said)
        except BaseException:
            process.terminate()  # it saves, as after any signal
            process.wait()
            job.state, job.reason = "interrupted", "the sweep was stopped; the same command continues"
            raise
        finally:
            job.seconds = round(spent + time.monotonic() - begun, 1)
            job.write()

    def _follow(self, process: subprocess.Popen[bytes], job: Job) -> str:
        """Waits for the end of a job; why it was stopped before, or nothing."""
        judged = -1
        while True:
            try:
                process.wait(timeout=LOOK_SECONDS if self.config.prune else None)
                return ""
            except subprocess.TimeoutExpired:
                losses = job.losses()
            if losses and max(losses) > judged:
                judged = max(losses)
                others = [one.losses() for one in jobs_in(self.folder) if one.state == "done"]
                reason = behind(
                    losses, others, after_jobs=self.config.prune_after_jobs, after_steps=self.config.prune_after_steps
                )
                if reason:
                    process.terminate()
                    process.wait()
                    return reason


def outcome(code: int, said: str) -> tuple[str, str]:
    """State and one-line reason of a job that ended by itself, from its exit code and what it printed."""
    if code == 0:
        return "done", ""
    if code < 0:
        name = signal.Signals(-code).name
        return "failed", f"killed by {name}" + (
            ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        )
    complaint = (
        said.rpartition("\nfinetune: ")[2] if "\nfinetune: " in f"\n{said}" else said.rstrip().rpartition("\n")[2]
    )
    line = " ".join(complaint.removeprefix("finetune: ").split()) or f"exit code {code}"
    return "interrupted" if code == EXIT_INTERRUPTED else "failed", line if len(
        line
    ) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 1]}…"
