"""Kills a training at three moments, resumes it each time, and compares its adapter with that of an undisturbed one::

    python -m benchmarks.resume +experiment=grpo_quick train.steps=4

The arguments are those of finetune. Both trainings are real command lines in processes of their own. SIGKILL comes
after a quarter, a half and three quarters of the steps, so it hits the step after: at work, with nothing saved since
the last checkpoint. The last line is JSON, with the SHA-256 of both adapters; the exit code is 1 where they differ.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.cache import file_sha256
from finetune.config import load
from finetune.console import log, print_error
from finetune.errors import ConfigError, FinetuneError

ROOT = Path(__file__).parents[1]
ADAPTER = "train/adapter/adapter_model.safetensors"
QUARTERS = (1, 2, 3)
SECONDS = 3600
"""A training that takes longer hangs."""

POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Trainings of one configuration in one folder.

    Attributes:
        overrides: Of finetune.
        folder: Receives runs and outputs.
    """

    overrides: tuple[str, ...]
    folder: Path

    def train(self, name: str, *, kill_after: int | None = None) -> int:
        """Starts or resumes a run up to its adapter.

        Args:
            name: Of the run.
            kill_after: Step after which its process group is killed; None lets it end.

        Returns:
            The exit code, negative for a signal.
        """
        words = [*self.overrides, f"run.root={self.folder}", f"run.name={name}", "run.until=train"]
        with open(self.folder / f"{name}.txt", "a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "finetune", *words, "run.if_exists=resume"], stdout=output,
                stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
            )  # fmt: skip
            until = time.monotonic() + SECONDS
            while process.poll() is None:
                if time.monotonic() > until or (kill_after is not None and self.step(name) >= kill_after):
                    os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(POLL_SECONDS)
        return process.wait()

    def step(self, name: str) -> int:
        """Returns the last step that a run logged, 0 before the first."""
        file = self.folder / name / "train" / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        complete = [json.loads(line) for line in lines if line.endswith("}")]
        return max((line["step"] for line in complete if "train/loss" in line), default=0)

    def adapter(self, name: str) -> str:
        """Returns the SHA-256 of a run's adapter.

        Raises:
            ConfigError: It has none.
        """
        if not (self.folder / name / ADAPTER).is_file():
            text = (self.folder / f"{name}.txt").read_text(encoding="utf-8")
            raise ConfigError(f"benchmarks.resume: the run {name!r} left no adapter: {text[-800:]}")
        return file_sha256(self.folder / name / ADAPTER, reuse=False)


def resume(overrides: Sequence[str], folder: Path) -> dict[str, object]:
    """Runs both trainings, and returns the result that is printed as JSON.

    Raises:
        FinetuneError: The configuration is wrong, or a training left no adapter.
    """
    steps = load(list(overrides)).train.steps
    if steps is None or steps <= len(QUARTERS):
        raise ConfigError(f"benchmarks.resume: set train.steps to at least {len(QUARTERS) + 1}; got {steps}")
    trial = Trial(overrides=tuple(overrides), folder=folder)
    trial.train("undisturbed")
    wanted = trial.adapter("undisturbed")
    log("resume", f"undisturbed: {wanted}")
    kills = [steps * quarter // (len(QUARTERS) + 1) for quarter in QUARTERS]
    for kill in kills:
        code = trial.train("killed", kill_after=kill)
        log("resume", f"killed after step {trial.step('killed')} of {steps}, exit code {code}")
        if code != -signal.SIGKILL:
            raise ConfigError(f"benchmarks.resume: the training ended before it was killed, with exit code {code}")
    trial.train("killed")
    found = trial.adapter("killed")
    log("resume", f"killed {len(kills)} times: {found}")
    return {"steps": steps, "killed_after": kills, "undisturbed": wanted, "killed": found, "equal": found == wanted}


def main() -> int:
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-resume-") as folder:
            result = resume(sys.argv[1:], Path(folder))
    except FinetuneError as error:
        return print_error(error, error.exit_code)
    print(json.dumps(result))
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
