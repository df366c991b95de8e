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


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    told = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in told.items()}}


def train_together(folder: Path, base: Path, tokenizer: Any, *, count: int, **settings: Any) -> list[tuple[int, str]]:
    """Trains with several processes; gives back exit code and output of each."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        prepared_rows(folder, tokenizer)
    port = free_port()
    command = [sys.executable, "-m", "tests.launch.worker", str(folder), str(base), json.dumps(settings)]
    running = [
        subprocess.Popen(command, env=environment(rank, count, port), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(count)
    ]
    outputs = [one.communicate(timeout=500)[0] for one in running]
    return [(one.returncode, output) for one, output in zip(running, outputs, strict=True)]


def curve(folder: Path, name: str = "train/loss") -> list[float]:
    """Losses of the steps, or another figure that is logged."""
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def seal(folder: Path, step: int) -> dict[str, Any]:
    """What the checkpoint of a step knows."""
    return json.loads((folder / "train" / "checkpoints" / f"checkpoint-{step}" / "seal.json").read_text())
