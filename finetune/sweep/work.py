"""Runs one job of a sweep in its own process. Hydra's launchers call this, here or on another machine."""

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
from finetune.sweep.jobs import FINAL, Job, job_lock, job_name, jobs_in
from finetune.sweep.median import should_prune

POLL_SECONDS = 1.0
"""How often the losses of a job that may be pruned are read."""

STARTS = {"new": "starts", "failed": "is tried again"}
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

    def run_job(self, overrides: Sequence[str], *, number: int) -> float:
        """Runs a job, unless it is finished already.

        Args:
            overrides: All of the job's, as Hydra's sweeper made them.
            number: The sweeper's number of the job.

        Returns:
            Its held-out loss, for a sweeper to minimize; nan if it failed or measured none.
        """
        pairs = (override.partition("=")[::2] for override in overrides)
        changed = {key: value for key, value in pairs if key not in self.fixed}
        with job_lock(self.folder / job_name(changed)) as lock:
            job = Job.of(self.folder, changed, number=number)
            was_finished = job.state in FINAL
            if not was_finished:
                self._run(job, overrides, lock=lock)
        loss = job.held_out().get("loss", math.nan)
        state = f"{job.state} before" if was_finished else f"{job.state} after {job.seconds:.0f} s"
        reason = f": {job.reason}" if job.reason else ""
        log("sweep", f"{job.title}: {state}{reason}" + ("" if math.isnan(loss) else f"; held-out loss {loss:.4f}"))
        return math.nan if job.state == "failed" else loss

    def _run(self, job: Job, overrides: Sequence[str], *, lock: int) -> None:
        log_file = job.folder / "log.txt"
        log("sweep", f"{job.title}: {STARTS.get(job.state, 'continues')}")
        placement = [f"run.root={self.folder}", f"run.name={job.folder.name}", f"sweep.name={self.folder.name}"]
        # The last override of a key wins, so the sweep's come after the user's.
        command = [sys.executable, "-m", "finetune", *overrides, *placement, "run.if_exists=resume"]
        started, seconds_before = time.monotonic(), job.seconds
        job.state, job.reason = "running", ""
        job.write()
        with open(log_file, "ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                start_new_session=True,
            )
        try:
            prune_reason = self._wait(process, job)
            output_text = log_file.read_bytes()[start:].decode(errors="replace")
            job.state, job.reason = (
                ("pruned", prune_reason) if prune_reason else outcome(process.returncode, output_text)
            )
        except BaseException:
            process.terminate()  # the job saves, as after any signal
            process.wait()
            job.state, job.reason = "interrupted", "the sweep was stopped; the same command continues"
            raise
        finally:
            job.seconds = round(seconds_before + time.monotonic() - started, 1)
            job.write()

    def _wait(self, process: subprocess.Popen[bytes], job: Job) -> str:
        """Waits for the end of a job. Returns why it was pruned; empty if it was not."""
        judged = -1
        while True:
            try:
                process.wait(timeout=POLL_SECONDS if self.config.prune else None)
                return ""
            except subprocess.TimeoutExpired:
                losses = job.losses()
            if losses and max(losses) > judged:
                judged = max(losses)
                reason = self._prune_reason(losses)
                if reason:
                    process.terminate()
                    process.wait()
                    return reason

    def _prune_reason(self, losses: dict[int, float]) -> str:
        others = [job.losses() for job in jobs_in(self.folder) if job.state == "done"]
        config = self.config
        return should_prune(losses, others, after_jobs=config.prune_after_jobs, after_steps=config.prune_after_steps)


def outcome(code: int, output: str) -> tuple[str, str]:
    """Returns state and one-line reason of a job that ended by itself, from its exit code and what it printed."""
    if code == 0:
        return "done", ""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return "failed", f"killed by {name}{hint}"
    _, is_ours, message = f"\n{output}".rpartition("\nfinetune: ")
    if not is_ours:
        message = output.rstrip().rpartition("\n")[2]
    line = " ".join(message.split()) or f"exit code {code}"
    if len(line) > LONGEST_REASON:
        line = f"{line[: LONGEST_REASON - 1]}…"
    return "interrupted" if code == EXIT_INTERRUPTED else "failed", line
