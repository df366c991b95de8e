"""Runs the stages of the check, each in a process of its own; a stage that fails is a result, and the next one runs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.walk_base import make_base
from benchmarks.walk_rows import write_rows
from finetune import hardware
from finetune.config import RunConfig, load
from finetune.environment import describe
from finetune.files import atomic_write_text

ROOT = Path(__file__).parents[2]
EXPERIMENT = "llama7b_qlora"
GIB = 1024**3
DISK_BYTES = 60 * GIB
"""The base (13.5 GB), its quantized copy, a merged model, and both runs."""

STAGE_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is measured.

    Attributes:
        work: Folder for base, runs and logs.
        tiny: Whether the base is two narrow layers of the same class.
        device: ``cuda`` or ``cpu``.
    """

    work: Path
    tiny: bool
    device: str

    @property
    def steps(self) -> int:
        """Returns the optimizer steps of each contender."""
        return 4 if self.tiny else 20

    @property
    def pack_tokens(self) -> int:
        """Returns the tokens of a packed row, one micro-batch."""
        return 128 if self.tiny else 2048

    @property
    def accumulate(self) -> int:
        """Returns the micro-batches of a step."""
        return 2 if self.tiny else 4

    @property
    def run(self) -> Path:
        """Returns the folder of this project's run."""
        return self.work / "outputs" / "ours"


def main(arguments: Sequence[str]) -> int:
    """Runs the check and prints its result as the last line.

    Returns:
        0 where every stage worked, 1 where one failed, 2 without a GPU.
    """
    tiny = "--tiny" in arguments
    names = [argument for argument in arguments if argument != "--tiny"]
    file = Path(names[0] if names else "outputs/check-gpu.json")
    machine = hardware.probe()
    if not machine.gpus and not tiny:
        reason = machine.gpu_obstacle or "NVML lists no NVIDIA GPU"
        print(f"check-gpu: {reason}; nothing was measured (--tiny shows on a CPU that the script works)")
        return 2
    shared_memory = Path("/dev/shm")
    free = os.statvfs(shared_memory) if shared_memory.is_dir() else None
    fast = free is not None and free.f_bavail * free.f_frsize > DISK_BYTES and not tiny
    with tempfile.TemporaryDirectory(prefix="check-gpu-", dir=shared_memory if fast else None) as folder:
        check = Check(work=Path(folder), tiny=tiny, device="cuda" if machine.gpus else "cpu")
        result = measure(check)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 1 if result["failed"] else 0


def measure(check: Check) -> dict[str, Any]:
    """Runs all stages and compares the contenders."""
    recipe = load([f"+experiment={EXPERIMENT}"])
    machine = hardware.probe(recipe.hardware)
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": lambda: run_tests(check),
        "base": lambda: {"parameters": make_base(recipe, check.work / "base", tiny=check.tiny)},
        "ours": lambda: train_ours(check, recipe),
        "trl": lambda: train_trl(check),
        "losses": lambda: python(check, "losses", "-m", "benchmarks.gpu.losses", check.run, check.work / "trl"),
    }
    found = {name: timed(stage) for name, stage in stages.items()}
    ours, trl, losses = found["ours"], found["trl"], found["losses"]
    return {
        "device": check.device,
        "tiny": check.tiny,
        "environment": describe(machine, hardware.place(machine, recipe)),
        "stages": found,
        "failed": [name for name, stage in found.items() if "error" in stage],
        "tokens_per_second": ours.get("tokens_per_second"),
        "ratio_trl": ratio(ours.get("tokens_per_second"), trl.get("tokens_per_second")),
        "peak_bytes": ours.get("peak_bytes"),
        "planned_bytes": ours.get("planned_bytes"),
        "peak_bytes_trl": trl.get("peak_bytes"),
        "loss_difference": losses["ours"] - losses["trl"] if "trl" in losses else None,
    }


def ratio(one: float | None, other: float | None) -> float | None:
    """Returns how many times the second the first one is; None where either is missing."""
    return round(one / other, 3) if one and other else None


def timed(stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what a stage measured and its seconds, or its error."""
    started = time.monotonic()
    try:
        result = stage()
    except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
        result = {"error": f"{type(error).__name__}: {error}"[-3000:]}
    return {**result, "wall_seconds": round(time.monotonic() - started, 1)}


def run_tests(check: Check) -> dict[str, Any]:
    """Runs the tests that need a GPU.

    Raises:
        ValueError: One failed.
    """
    if check.device == "cpu":
        return {"left_out": "they need a GPU"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STAGE_SECONDS, check=False)
    if done.returncode:
        raise ValueError(done.stdout[-2500:])
    return {"summary": done.stdout.strip().splitlines()[-1]}


def train_ours(check: Check, recipe: RunConfig) -> dict[str, Any]:
    """Trains and merges with this project; the recipe's settings but for what both contenders share."""
    rows = write_rows(check.work, recipe.data.format, training=64 if check.tiny else 4000, heldout=16)
    overrides = [
        f"+experiment={EXPERIMENT}",
        f"model.name={check.work / 'base'}",
        f"model.template={recipe.model.template}",
        f"run.root={check.run.parent}",
        f"run.name={check.run.name}",
        "run.until=merge",
        *rows,
        "data.heldout_rows=null",
        f"data.max_tokens={check.pack_tokens}",
        f"data.pack_tokens={check.pack_tokens}",
        f"train.steps={check.steps}",
        f"train.rows_per_step={check.accumulate}",
        "train.tokens_per_step=null",
        "train.micro_batch=1",
        "train.evaluations=0",
        "train.checkpoints=0",
        "train.log_steps=1",
        "optim=adamw_8bit",
        "lora.rank=16",
        "merge.candidates=[original]",
        "merge.choose=original",
        "merge.max_loss_increase=10",
        "merge.measure_tokens=60",
        "tracking=[]",
        "preflight=off",  # random weights hardly attend, so the packing check has nothing to divide by
    ]
    python(check, "ours", "-m", "finetune", *overrides, parse=False)
    train, planned = manifest(check.run / "train"), manifest(check.run / "plan")["product"]
    lines = (check.run / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [
        point["train/tokens_per_second"] for point in map(json.loads, lines) if "train/tokens_per_second" in point
    ]
    return {
        "tokens_per_second": round(statistics.median(speeds[warm_steps(check.steps) :]), 1),
        "peak_bytes": train["peak_device_bytes"],
        "planned_bytes": planned["needed_bytes"],
        "first_loss": train["product"]["first_loss"],
        "final_loss": train["product"]["final_loss"],
        "kernels": manifest(check.run / "model")["product"]["kernels"],
        "merge_seconds": manifest(check.run / "merge")["seconds"],
        "merge_peak_rss_bytes": manifest(check.run / "merge")["peak_rss_bytes"],
    }


def train_trl(check: Check) -> dict[str, Any]:
    """Trains the same rows with TRL's trainer."""
    shape = [str(number) for number in (check.steps, check.pack_tokens, check.accumulate)]
    return python(
        check, "trl", "-m", "benchmarks.gpu.trl_sft", check.run, check.work / "base", check.work / "trl", *shape
    )


def warm_steps(steps: int) -> int:
    """Returns the steps that are not measured: the first ones choose kernels and reserve memory."""
    return min(3, steps // 2)


def python(check: Check, name: str, *command: object, parse: bool = True) -> dict[str, Any]:
    """Runs Python in a process of its own; returns its last line as JSON.

    Raises:
        ValueError: It failed; the message ends with the end of its output.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "FINETUNE_CACHE": str(check.work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
    }
    log = check.work / f"{name}.log"
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=STAGE_SECONDS,
            check=False,
        )
    text = log.read_text(encoding="utf-8", errors="replace")
    if done.returncode:
        raise ValueError(f"exit code {done.returncode}: {text[-2500:]}")
    result: dict[str, Any] = json.loads(text.strip().splitlines()[-1]) if parse else {}
    return result


def manifest(stage: Path) -> dict[str, Any]:
    """Reads what a stage recorded."""
    content: dict[str, Any] = json.loads((stage / "manifest.json").read_text(encoding="utf-8"))
    return content
