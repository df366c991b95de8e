"""Measures the memory of trainings on this machine's CPU: ``python -m benchmarks.measure_plan FILE [--only NAME]``.

Each setting trains the quickstart's model for three steps in a process of its own. FILE gets rows in the form that
benchmarks/check_plan.py reads; settings that FILE has already are not measured again.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "data" / "quickstart" / "train.jsonl"
COMMON = [
    "+experiment=quickstart", "preflight=off", "tracking=[]", "train.steps=3", "train.tokens_per_step=null",
    "train.evaluations=0", "train.checkpoints=0",
]  # fmt: skip

SETTINGS: dict[str, list[str]] = {
    "nf4, 1 x 512": ["train.micro_batch=1", "data.pack_tokens=512"],
    "nf4, 4 x 512": ["train.micro_batch=4", "data.pack_tokens=512"],
    "nf4, 4 x 512, checkpointing": ["train.micro_batch=4", "data.pack_tokens=512", "train.checkpointing=full"],
    "nf4, 1 x 2048": ["train.micro_batch=1", "data.pack_tokens=2048"],
    "nf4, 2 x 512, rank 64": ["train.micro_batch=2", "data.pack_tokens=512", "lora.rank=64"],
    "nf4, 2 x 1024, selective": ["train.micro_batch=2", "data.pack_tokens=1024", "train.checkpointing=selective"],
    "nf4 plain constants, 2 x 256": ["quantization=nf4", "train.micro_batch=2", "data.pack_tokens=256"],
    "fp4, 2 x 512, adamw": ["quantization=fp4", "optim=adamw", "train.micro_batch=2", "data.pack_tokens=512"],
    "none, 1 x 512": ["quantization=none", "train.micro_batch=1", "data.pack_tokens=512"],
    "none, 2 x 1024, rank 8": ["quantization=none", "train.micro_batch=2", "data.pack_tokens=1024", "lora.rank=8"],
    "none, 8 x 512, checkpointing": [
        "quantization=none", "train.micro_batch=8", "data.pack_tokens=512", "train.checkpointing=full",
    ],
    "none, 4 x 512, q and v": [
        "quantization=none", "train.micro_batch=4", "data.pack_tokens=512", "lora.targets=[q_proj,v_proj]",
    ],
    "int8, 2 x 512": ["quantization=int8", "train.micro_batch=2", "data.pack_tokens=512"],
    "nf4, 2 x 512, dropout": ["train.micro_batch=2", "data.pack_tokens=512", "lora.dropout=0.1"],
    "nf4, 2 x 512, plain layers": ["kernels=plain", "train.micro_batch=2", "data.pack_tokens=512"],
    "nf4, 2 x 512, plain, checkpointing": [
        "kernels=plain", "train.micro_batch=2", "data.pack_tokens=512", "train.checkpointing=full",
    ],
    "nf4, 8 pairs of up to 72": [
        "data=preference", "data.objective=preference", "train.objective=dpo", "data.path={pairs}",
        "data.heldout_share=0.05", "data.max_tokens=72", "train.micro_batch=8",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", action="append", help="a setting by its name; all without it")
    arguments = parser.parse_args()
    rows = json.loads(arguments.file.read_text())["rows"] if arguments.file.is_file() else []
    libraries = libraries_bytes()
    print(f"a process with the libraries and nothing else: {libraries / 1e6:.0f} MB")
    for number, name in enumerate(SETTINGS, start=1):
        if (arguments.only and name not in arguments.only) or any(row["note"] == name for row in rows):
            continue
        row = measure(name, number=number, libraries=libraries)
        rows.append(row)
        arguments.file.write_text(
            json.dumps({"made": "benchmarks/measure_plan.py", "n": len(rows), "rows": rows}, indent=1) + "\n"
        )
        print(f"{name}: {row['reported']:.0f} MB", flush=True)


def measure(name: str, *, number: int, libraries: int) -> dict[str, Any]:
    """Trains a setting and returns its row; the figure is the peak resident memory of the train stage."""
    with tempfile.TemporaryDirectory() as folder:
        micro_batch = next(int(o.split("=")[1]) for o in SETTINGS[name] if o.startswith("train.micro_batch="))
        overrides = [*COMMON, *(o.format(pairs=pairs(Path(folder))) if "{pairs}" in o else o for o in SETTINGS[name])]
        overrides.append(f"train.rows_per_step={2 * micro_batch}")
        for until in (
            "model",
            "train",
        ):  # the first start of a base quantizes it; every later one reads the copy that it keeps
            train(
                [*overrides, f"run.until={until}", "run.name=measured", "run.if_exists=overwrite", f"run.root={folder}"]
            )
        trained = json.loads((Path(folder) / "measured" / "train" / "manifest.json").read_text())
        plan = json.loads((Path(folder) / "measured" / "plan" / "manifest.json").read_text())["product"]
        return {
            "id": number,
            "model": "smollm2_135m",
            "params_b": plan["parameters"] / 1e9,
            "method": "qlora" if "nf4" in name else "lora",
            "overrides": [override.replace(f"{folder}/", "") for override in overrides],
            "gpu": None,
            "n_gpus": 0,
            "reported": trained["peak_rss_bytes"] / 1e6,
            "unit": "MB",
            "libraries": libraries / 1e6,
            "kind": "peak RSS of the process",
            "source": f"benchmarks/measure_plan.py, {platform.machine()}, {os.cpu_count()} cores",
            "unknown_conditions": [],
            "note": name,
        }


def train(overrides: list[str]) -> None:
    command = [sys.executable, "-m", "finetune", *overrides]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def pairs(folder: Path) -> Path:
    """Writes the quickstart's requests, each with its answer and that of the next row."""
    file = folder / "pairs.jsonl"
    if not file.is_file():
        rows = [json.loads(line)["messages"] for line in QUICKSTART.read_text(encoding="utf-8").splitlines()]
        texts = [{message["role"]: message["content"] for message in row} for row in rows]
        preferences = [
            {"prompt": a["user"], "chosen": a["assistant"], "rejected": b["assistant"]}
            for a, b in itertools.pairwise(texts)
        ]
        file.write_text(
            "".join(json.dumps(row) + "\n" for row in preferences if row["chosen"] != row["rejected"]), encoding="utf-8"
        )
    return file


def libraries_bytes() -> int:
    """Measures the resident memory of a process that has only imported what a training imports."""
    code = "import finetune.pipeline, finetune.train.trainer, psutil; print(psutil.Process().memory_info().rss)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return int(answer.stdout.split()[-1])


if __name__ == "__main__":
    main()
