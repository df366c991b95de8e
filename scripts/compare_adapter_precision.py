"""float32 against bfloat16 adapters: the quickstart's task, several seeds, paired on the same held-out rows.

    python scripts/compare_adapter_precision.py [seeds] [steps]

Prints a table and one line of JSON; docs/adapter-precision.md keeps a result.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from finetune import hardware
from finetune.config import load
from finetune.inference.adapted import free_memory, load_adapted_model
from finetune.inference.losses import row_losses
from finetune.inference.rows import read_rows
from finetune.model import ModelSpec

DTYPES = ("float32", "bfloat16")
ROOT = Path("outputs/precision")
RESAMPLES = 10_000


def main() -> None:
    seeds, steps = (int(argument) for argument in [*sys.argv[1:], "3", "72"][:2])
    nats = {dtype: [train_and_measure(dtype, seed, steps) for seed in range(1, seeds + 1)] for dtype in DTYPES}
    tokens = nats["float32"][0][1]
    for dtype in DTYPES:
        each = ", ".join(f"{losses.sum() / tokens.sum():.4f}" for losses, _ in nats[dtype])
        print(f"{dtype:9} held-out loss by seed: {each}")
    change = np.mean([half[0] - full[0] for half, full in zip(nats["bfloat16"], nats["float32"], strict=True)], axis=0)
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(tokens), (RESAMPLES, len(tokens)))
    low, high = np.quantile(change[picks].sum(1) / tokens[picks].sum(1), [0.025, 0.975])
    result = {
        "difference": change.sum() / tokens.sum(),
        "low": low,
        "high": high,
        "rows": len(tokens),
        "seeds": seeds,
        "steps": steps,
    }
    print("bfloat16 minus float32, nats a trained token, mean over seeds, 95 % interval by bootstrap over rows:")
    print(json.dumps({name: round(float(value), 5) for name, value in result.items()}))


def train_and_measure(dtype: str, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss in nats and trained tokens of every held-out row."""
    name = f"{dtype}-{seed}"
    settings = [
        "+experiment=quickstart",
        f"lora.dtype={dtype}",
        f"run.seed={seed}",
        f"run.name={name}",
        f"run.root={ROOT}",
        f"train.steps={steps}",
    ]
    command = [sys.executable, "-m", "finetune", *settings, "run.until=train", "run.if_exists=resume", "tracking=[]",
               "train.evaluations=0"]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = load(["+experiment=quickstart"])
    placement = hardware.place(hardware.probe(config.hardware), config)
    folder = ROOT / name
    graph = load_adapted_model(ModelSpec.resolve(config, placement), folder / "train" / "adapter")
    losses = row_losses(graph, read_rows(folder / "data" / "heldout"), batch_tokens=2048)
    del graph
    free_memory()
    print(f"{name}: {sum(row.loss for row in losses) / sum(row.tokens for row in losses):.4f}", flush=True)
    return np.array([row.loss for row in losses]), np.array([row.tokens for row in losses])


if __name__ == "__main__":
    main()
