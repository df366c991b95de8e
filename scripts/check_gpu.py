"""Runs the tests marked gpu, then trains with fused and with plain kernels, and writes the measurements as JSON.

    make check-gpu        # or: python scripts/check_gpu.py [FILE]

Writes FILE (outputs/check-gpu.json) and prints it. The exit code is 2 without an NVIDIA GPU and 1 if a test failed.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from finetune import hardware
from finetune.config import load
from finetune.environment import describe
from finetune.run import write_json

CONTENDERS: dict[str, list[str]] = {
    "fused": [],
    "plain": ["kernels=plain"],
    "checkpointing full": ["train.checkpointing=full"],
}


def main() -> int:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/check-gpu.json")
    if not torch.cuda.is_available():
        print("check-gpu: torch sees no NVIDIA GPU here (nvidia-smi shows what the driver sees); nothing was measured")
        return 2
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu"], capture_output=True, text=True, check=False)
    print(tests.stdout[-2000:])
    config = load(["+experiment=quickstart"])
    machine = hardware.probe(config.hardware)
    result = {
        "environment": describe(machine, hardware.place(machine, config)),
        "tests": {"passed": tests.returncode == 0, "summary": tests.stdout.strip().splitlines()[-1]},
        "training": {name: train(name, overrides) for name, overrides in CONTENDERS.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    print(json.dumps(result))
    return tests.returncode


def train(name: str, overrides: list[str]) -> dict[str, Any]:
    """Trains the quickstart and returns its speed and memory."""
    run = f"check-gpu-{name.replace(' ', '-')}"
    settings = [
        "+experiment=quickstart",
        f"run.name={run}",
        "run.if_exists=overwrite",
        "run.until=train",
        "tracking=[]",
        "train.evaluations=0",
    ]
    subprocess.run([sys.executable, "-m", "finetune", *settings, *overrides], check=True)
    manifest = json.loads(Path("outputs", run, "train", "manifest.json").read_text())
    product = manifest["product"]
    names = ("tokens_per_second", "trained_tokens_per_second", "first_loss", "final_loss", "steps", "tokens")
    return {"peak_device_bytes": manifest["peak_device_bytes"], **{key: product[key] for key in names}}


if __name__ == "__main__":
    sys.exit(main())
