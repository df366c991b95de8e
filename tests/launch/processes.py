"""Starts the processes of a small training as a launcher would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.rows import prepared_rows

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environment(rank: int, count: int) -> dict[str, str]:
    """What torchrun tells a process, the port apart."""
    told = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    return {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        **{name: str(value) for name, value in told.items()},
    }


def train_together(folder: Path, base: Path, tokenizer: Any, *, count: int, **settings: Any) -> list[tuple[int, str]]:
    """Trains with several processes; gives back exit code and output of each."""
    return train_in_turn(base, tokenizer, [(folder, settings)], count=count)


def train_in_turn(
    base: Path, tokenizer: Any, runs: list[tuple[Path, dict[str, Any]]], *, count: int
) -> list[tuple[int, str]]:
    """Several trainings by the same processes, which take seconds to start; ``ended with <code>`` stands between their outputs."""
    for folder, _ in runs:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").exists():
            prepared_rows(folder, tokenizer)
    told = json.dumps([(free_port(), str(folder), settings) for folder, settings in runs])
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.launch.worker", str(base), told], env=environment(rank, count), cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]  # fmt: skip
    outputs = [one.communicate(timeout=500)[0] for one in running]
    return [(one.returncode, output) for one, output in zip(running, outputs, strict=True)]


def codes(output: str) -> list[int]:
    """How the trainings of one process ended."""
    return [int(line.removeprefix("ended with ")) for line in output.splitlines() if line.startswith("ended with ")]


def curve(folder: Path, name: str = "train/loss") -> list[float]:
    """Losses of the steps, or another figure that is logged."""
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def seal(folder: Path, step: int) -> dict[str, Any]:
    """What the checkpoint of a step knows."""
    return json.loads((folder / "train" / "checkpoints" / f"checkpoint-{step}" / "seal.json").read_text())
