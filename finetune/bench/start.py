"""From the program's start to its first optimizer step: as a user waits for it, twice, since the first run prepares."""

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


def bench(*, repeats: int) -> None:
    """Prints one line of JSON: seconds to the first optimizer step, unprepared and prepared.

    The step's end is the time that train/metrics.jsonl gives it. Unprepared is what this machine's cache makes of it:
    with an emptied cache, the base is quantized and the data are prepared on the way.

    Args:
        repeats: Prepared starts; the fastest counts.

    Raises:
        TrainError: A run failed.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-start-") as place:
        first = seconds_to_first_step(Path(place), "first")
        log("bench", f"first start: {first:.1f} s to the end of the first optimizer step")
        again = [seconds_to_first_step(Path(place), f"again{number}") for number in range(repeats)]
    log("bench", f"prepared starts: {', '.join(f'{seconds:.1f}' for seconds in again)} s")
    log("bench", json.dumps({"first_start_seconds": round(first, 2), "prepared_start_seconds": round(min(again), 2)}))


def seconds_to_first_step(folder: Path, name: str) -> float:
    """Starts a process and takes the time until its first step is written down."""
    command = [sys.executable, "-m", "finetune", *ONE_STEP, f"run.root={folder}", f"run.name={name}"]
    begun = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainError(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    with open(folder / name / "train" / "metrics.jsonl", encoding="utf-8") as lines:
        return float(json.loads(next(lines))["time"]) - begun
