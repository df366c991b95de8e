"""Measures two adapters of one base on the same held-out rows, with one function.

python -m benchmarks.gpu.losses RUN ADAPTER

RUN is a run of this project, ADAPTER the other adapter's folder. The last line is JSON: nats per trained token.
"""

import json
import sys
from pathlib import Path

from finetune import hardware
from finetune.config import load
from finetune.inference.adapted import free_memory, load_adapted_model
from finetune.inference.losses import mean_loss, row_losses
from finetune.inference.rows import read_rows
from finetune.model import ModelSpec


def losses(run: Path, adapters: dict[str, Path]) -> dict[str, float]:
    """Returns the loss of each adapter, in nats per trained token."""
    config = load(json.loads((run / "overrides.json").read_text(encoding="utf-8")))
    spec = ModelSpec.resolve(config, hardware.place(hardware.probe(config.hardware), config))
    rows, found = read_rows(run / "data" / "heldout"), {}
    for name, adapter in adapters.items():
        model = load_adapted_model(spec, adapter)
        found[name] = mean_loss(row_losses(model, rows, batch_tokens=2048))
        del model
        free_memory()
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(json.dumps(losses(folder, {"ours": folder / "train" / "adapter", "trl": Path(sys.argv[2])})))
