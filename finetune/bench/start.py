"""`finetune bench start`: measures the time from the program's start to its first optimizer step, unprepared and
prepared."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetune.console import log
from finetune.errors import TrainError

ONE_STEP = ["+experiment=quickstart", "train.steps=1", "train.evaluations=0", "run.until=train"]


def measure_start(*, repeats: int) -> None:
    """Prints one line of JSON: seconds to the first optimizer step, unprepared and prepared.

    The step ends at the time that train/metrics.jsonl records. How unprepared the first start is depends on this
    machine's cache: with an empty one, the base is quantized and the data are prepared too.

    Args:
        repeats: Prepared starts; the fastest counts.

    Raises:
        TrainError: A run failed.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-start-") as scratch:
        first = seconds_to_first_step(Path(scratch), "first")
        log("bench", f"first start: {first:.1f} s to the end of the first optimizer step")
        prepared = [seconds_to_first_step(Path(scratch), f"again{number}") for number in range(repeats)]
    log("bench", f"prepared starts: {', '.join(f'{seconds:.1f}' for seconds in prepared)} s")
    log(
        "bench", json.dumps({"first_start_seconds": round(first, 2), "prepared_start_seconds": round(min(prepared), 2)})
    )


def seconds_to_first_step(folder: Path, name: str) -> float:
    """Starts a process and returns the seconds until its first step is recorded."""
    command = [sys.executable, "-m", "finetune", *ONE_STEP, f"run.root={folder}", f"run.name={name}"]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainError(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    with open(folder / name / "train" / "metrics.jsonl", encoding="utf-8") as lines:
        return float(json.loads(next(lines))["time"]) - started
