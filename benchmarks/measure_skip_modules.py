"""Measures layers in full precision against uniform NF4: ``python -m benchmarks.measure_skip_modules TEXT ...``.

Layers are chosen on the first half of each text; KL and loss against the dense base are measured on its second half.
The control keeps layers drawn at random for the same budget. The base is moved off the 4-bit grid that the quickstart's
GGUF lies on.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
from pathlib import Path
from typing import Any

from finetune.bench.off_grid import moved_off_the_grid
from finetune.bench.quantization import text_rows
from finetune.config import load as compose
from finetune.hardware import Placement
from finetune.inference.adapted import free_memory
from finetune.inference.kl_divergence import ReferenceLogits, compare_with_reference, record_reference
from finetune.lora.init import checkpoint_reader
from finetune.model import Base, ModelSpec, fetch
from finetune.model.base import weights_sha256
from finetune.model.load import resident_bytes
from finetune.quantization import QuantizationConfig, quantized_layers
from finetune.quantization.sensitivity import MIB, choose, extra_bytes, rounding_costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=2048, help="of each text, half to choose and half to measure")
    parser.add_argument("--budgets", nargs="+", type=float, default=[4.0, 16.0], help="MiB")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    config = compose(["+experiment=quickstart"])
    base = fetch(config.model)
    folder = moved_off_the_grid(base)
    moved = Base(folder=folder, name=base.name, revision=None, sha256=weights_sha256(folder), source="folder")
    placement = Placement(
        device="cpu", dtype="bfloat16", attention="sdpa", optimizer="none", optimizer_reason="", threads=1, reasons=()
    )
    print("| text | kept | MiB in memory | KL | loss |")
    print("|---|---|---|---|---|")

    def measured(
        name: str, quantization: QuantizationConfig, reference: ReferenceLogits, *, text: Path, rows: list[Any]
    ) -> Any:
        model: Any = ModelSpec(base=moved, config=config.model, quantization=quantization, placement=placement).load()
        compared = compare_with_reference(model, rows, reference, batch_tokens=1024)
        print(
            f"| {text.name} | {name} | {resident_bytes(model) / MIB:.1f} | {compared.kl:.4f} | {compared.loss:.4f} |",
            flush=True,
        )
        return model

    for text in arguments.texts:
        rows = text_rows(text, base.folder, arguments.tokens)
        chosen_on, measured_on = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        with tempfile.TemporaryDirectory() as place:
            dense = ModelSpec(
                base=moved, config=config.model, quantization=QuantizationConfig(method="none"), placement=placement
            ).load()
            reference = record_reference(dense, measured_on, Path(place) / "reference.f32", batch_tokens=1024)
            print(
                f"| {text.name} | everything | {resident_bytes(dense) / MIB:.1f} | 0 | {reference.loss:.4f} |",
                flush=True,
            )
            del dense
            free_memory()
            uniform = QuantizationConfig(method="nf4", double=True)
            model = measured("nothing", uniform, reference, text=text, rows=measured_on)
            costs = rounding_costs(model, checkpoint_reader(folder), [row["input_ids"] for row in chosen_on])
            candidates: list[dict[str, Any]] = [
                {"layer": name, "cost": costs[name], "bytes": extra_bytes(layer, 2)}
                for name, layer in quantized_layers(model).items()
            ]
            del model
            free_memory()
            drawn = [
                {**layer, "cost": random.Random(f"{arguments.seed}{layer['layer']}").random() * layer["bytes"]}
                for layer in candidates
            ]
            for budget in arguments.budgets:
                for name, layers in (("by measure", candidates), ("at random", drawn)):
                    chosen, _ = choose(layers, budget=int(budget * MIB))
                    keep = [layer["layer"] for layer in chosen]
                    kept = dataclasses.replace(uniform, skip_modules=keep)
                    measured(f"{budget:g} MiB {name}: {len(keep)} layers", kept, reference, text=text, rows=measured_on)
                    free_memory()


if __name__ == "__main__":
    main()
