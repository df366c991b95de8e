"""`finetune bench speed`: compares training speed with `trl sft`, and each option of the kernels group with its plain
form.

Every contender is its own process on the same rows, with the same tokens per step and the same seed; they take turns.
One function measures every adapter's held-out loss afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from finetune.console import human_bytes, log
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.hardware import Placement

PACK_TOKENS = 1024
PACKS_PER_STEP = 2
TRL_ROWS, TRL_ACCUMULATE = 4, 2
"""About as many tokens per step as two packs of 1,024: these rows have 220 on average."""

LEARNING_RATE, RANK, ALPHA = 2e-4, 16, 32
HELD_OUT_ROWS = 64
FLOP_PER_TOKEN_AND_PARAMETER = 4
"""Two each for the forward pass and the gradient of the input; frozen weights get no gradient."""

ABLATIONS = {
    "everything plain": ["kernels=plain"],
    "layers plain": ["kernels.layers=plain"],
    "weights quantized": ["kernels.weights=quantized"],
    "loss on all tokens": ["kernels.loss=all"],
    "kernels plain": ["kernels.implementation=plain"],
    "memory plain": ["kernels.memory=plain"],
    "checkpointing selective": ["train.checkpointing=selective"],
    "checkpointing full": ["train.checkpointing=full"],
}

OTHER_STARTS = {"ours, start 2": ["run.seed=2"], "ours, start 3": ["run.seed=3"]}
"""The same training from other random adapters and in another order; the spread of their losses is the noise of a
loss."""

LIKE_TRL = "ours, as trl comes"
LIKE_TRL_OVERRIDES = [
    "data.packing=false",
    f"train.micro_batch={TRL_ROWS}",
    f"train.rows_per_step={TRL_ROWS * TRL_ACCUMULATE}",
    "model.dtype=float32",
]
"""The dtype and the batches of `trl sft` as it comes, to compare losses: float32 ends lower than bfloat16 in either
trainer."""


@dataclass(frozen=True, slots=True)
class SpeedResult:
    """Measurements of one training.

    Attributes:
        tokens_per_second: In the training loop, padding not counted.
        peak_rss_bytes: Of the whole process.
        seconds: Of the whole process.
        held_out_loss: Nats per trained token afterwards, on rows that were not trained on.
    """

    name: str
    tokens_per_second: float
    peak_rss_bytes: int
    seconds: float
    held_out_loss: float


def compare_training_speed(source: Path, *, rows: int, against: str | None, repeats: int) -> None:
    """Prints a table and one line of JSON.

    Args:
        source: JSON Lines with ``question`` and ``answer``.
        rows: Rows to train on; the next 64 are held out.
        against: ``trl`` compares with it; None compares this project's options with each other.
        repeats: Runs of each contender except TRL as it comes, which takes minutes; the fastest counts.

    Raises:
        ConfigError: The source has too few rows.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        folder = Path(scratch)
        write_rows(source, folder, rows)
        others = OTHER_STARTS | {LIKE_TRL: LIKE_TRL_OVERRIDES} if against else ABLATIONS
        contenders: dict[str, list[str]] = {"ours": [], **others}
        results: dict[str, list[SpeedResult]] = {}
        for turn in range(repeats):
            for name, overrides in contenders.items():
                results.setdefault(name, []).append(ours(name, folder, overrides))
            if against and turn == 0:
                results["trl as it comes"] = [trl("trl as it comes", folder, tuned=False)]
            if against:
                results.setdefault("trl tuned by hand", []).append(trl("trl tuned by hand", folder, tuned=True))
        best = {name: max(turns, key=lambda turn: turn.tokens_per_second) for name, turns in results.items()}
        loaded = json.loads((folder / "runs" / "ours" / "model" / "manifest.json").read_text())["product"]
    for result in best.values():
        log(
            "bench",
            f"{result.name:24} {result.tokens_per_second:7.0f} tokens/s, peak {human_bytes(result.peak_rss_bytes)}, "
            f"{result.seconds:.0f} s, held-out loss {result.held_out_loss:.4f}",
        )
    against_trl = summarize(best, loaded["parameters"]) if against else None
    sys.stdout.write(json.dumps(against_trl or {name: asdict(result) for name, result in best.items()}) + "\n")


def summarize(best: dict[str, SpeedResult], parameters: int) -> dict[str, float]:
    """Returns the comparison with TRL as ratios and differences."""
    mine, tuned = best["ours"], best["trl tuned by hand"]
    starts = [best[name].held_out_loss for name in ("ours", *OTHER_STARTS)]
    limit = matmul_limit()
    log("bench", f"the machine's matrix products reach {limit / 1e12:.2f} TFLOP/s at the widest shape of this model")
    return {
        "ratio_trl_default": round(mine.tokens_per_second / best["trl as it comes"].tokens_per_second, 2),
        "ratio_trl_tuned": round(mine.tokens_per_second / tuned.tokens_per_second, 2),
        "tokens_per_second": mine.tokens_per_second,
        "matmul_share_of_limit": round(mine.tokens_per_second * FLOP_PER_TOKEN_AND_PARAMETER * parameters / limit, 3),
        "peak_rss_bytes": mine.peak_rss_bytes,
        "loss_difference": round(mean(starts) - tuned.held_out_loss, 4),
        "loss_difference_default": round(best[LIKE_TRL].held_out_loss - best["trl as it comes"].held_out_loss, 4),
        "loss_between_starts": round(max(starts) - min(starts), 4),
    }


def write_rows(source: Path, folder: Path, rows: int) -> None:
    """Writes the rows to train on and the held-out rows, as prompt and completion messages."""
    if not source.is_file():
        raise ConfigError(f"bench speed: source={source} is not a file; give JSON Lines with question and answer")
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[: rows + HELD_OUT_ROWS]]
    if len(lines) < rows + HELD_OUT_ROWS:
        raise ConfigError(
            f"bench speed: {source} has {len(lines)} rows and {rows + HELD_OUT_ROWS} are needed; lower rows"
        )
    conversations = [
        {
            "prompt": [{"role": "user", "content": line["question"]}],
            "completion": [{"role": "assistant", "content": line["answer"]}],
        }
        for line in lines
    ]
    (folder / "trl").mkdir()
    for file, part in (("trl/train.jsonl", conversations[:rows]), ("heldout.jsonl", conversations[rows:])):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def ours(name: str, folder: Path, overrides: Sequence[str]) -> SpeedResult:
    """Runs this project up to the trained adapter."""
    root = folder / "runs"
    command = [
        sys.executable, "-m", "finetune", f"run.root={root}", "run.name=ours", "run.if_exists=overwrite",
        "run.until=train", "data=custom", f"data.path={folder / 'trl' / 'train.jsonl'}",
        f"data.heldout_path={folder / 'heldout.jsonl'}",
        f"data.max_tokens={PACK_TOKENS}", f"train.micro_batch={PACKS_PER_STEP}", "train.tokens_per_step=null",
        f"train.rows_per_step={PACKS_PER_STEP}", "train.steps=null", "train.epochs=1", "train.evaluations=0",
        "train.checkpoints=0", "optim=adamw", f"optim.learning_rate={LEARNING_RATE}",
        "optim.schedule=constant", "optim.warmup=0", "optim.max_grad_norm=1.0", f"lora.rank={RANK}",
        f"lora.alpha={ALPHA}", "tracking=[]", *overrides,
    ]  # fmt: skip
    seconds, peak = run_timed(name, command, folder, {})
    product = json.loads((root / "ours" / "train" / "manifest.json").read_text())["product"]
    loss = held_out_loss(root / "ours" / "train" / "adapter", root / "ours" / "data" / "heldout")
    return SpeedResult(name, product["tokens_per_second"], peak, seconds, loss)


def trl(name: str, folder: Path, *, tuned: bool) -> SpeedResult:
    """Runs `trl sft` on the same rows: as it comes, or packed, without checkpointing, in our dtype, all threads."""
    out = folder / "trl-out"
    shutil.rmtree(out, ignore_errors=True)
    settings = {
        "model_name_or_path": base_folder(), "dataset_name": folder / "trl", "output_dir": out, "lora_r": RANK,
        "lora_alpha": ALPHA, "lora_dropout": 0, "lora_target_modules": "all-linear", "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "num_train_epochs": 1, "seed": 1, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1,
    }  # fmt: skip
    flags = ["--load_in_4bit", "--use_bnb_nested_quant", "--use_peft", "--use_cpu"]
    flags += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    command = [str(Path(sys.executable).with_name("trl")), "sft", *flags]
    batch = ["--per_device_train_batch_size", str(TRL_ROWS), "--gradient_accumulation_steps", str(TRL_ACCUMULATE)]
    if tuned:
        dtype = quickstart_placement().dtype
        batch = ["--per_device_train_batch_size", str(PACKS_PER_STEP), "--packing", "--max_length", str(PACK_TOKENS)]
        batch += ["--gradient_checkpointing", "false", "--dtype", dtype, "--bf16", str(dtype == "bfloat16").lower()]
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))} if tuned else {}  # its launcher sets 1
    seconds, peak = run_timed(name, [*command, *batch], folder, threads)
    runs = folder / "runs" / "ours"
    product = json.loads((runs / "data" / "manifest.json").read_text())["product"]
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    runtime = float(text.rpartition("'train_runtime':")[2].split(",")[0].strip(" '\""))
    loss = held_out_loss(out, runs / "data" / "heldout")
    return SpeedResult(name, round(product["tokens"] / runtime, 1), peak, seconds, loss)


def run_timed(name: str, command: Sequence[str], folder: Path, environment: dict[str, str]) -> tuple[float, int]:
    """Runs a process that must succeed; returns its seconds and peak resident memory.

    Raises:
        ConfigError: It failed; the message ends with its last output.
    """
    log("bench", f"{name} ...")
    started = time.monotonic()
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    with open(folder / "log.txt", "wb") as log_file:
        process = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, env=variables)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        raise ConfigError(f"bench: {name} ended with {process.returncode}: {tail}")
    return round(time.monotonic() - started, 1), usage.ru_maxrss * 1024


def held_out_loss(adapter: Path, rows: Path) -> float:
    """Measures nats per trained token of the quantized base with an adapter, whoever trained it."""
    from finetune.config import load
    from finetune.inference.adapted import free_memory, load_adapted_model
    from finetune.inference.losses import mean_loss, row_losses
    from finetune.inference.rows import read_rows
    from finetune.model import ModelSpec

    config = load(["+experiment=quickstart"])
    model = load_adapted_model(ModelSpec.resolve(config, quickstart_placement()), adapter)
    loss = mean_loss(row_losses(model, read_rows(rows), batch_tokens=2048))
    del model
    free_memory()
    return loss


def quickstart_placement() -> Placement:
    """Decides where and in which dtype the contenders compute."""
    from finetune import hardware
    from finetune.config import load

    config = load(["+experiment=quickstart"])
    return hardware.place(hardware.probe(config.hardware), config)


def base_folder() -> Path:
    """Returns the folder of the quickstart's base in safetensors, which `trl sft` can load."""
    from finetune.config import load
    from finetune.model import fetch

    return fetch(load(["+experiment=quickstart"]).model).folder


def matmul_limit() -> float:
    """Measures operations per second of this model's widest product, in the dtype of the training; the best of 30."""
    import torch

    dtype = getattr(torch, quickstart_placement().dtype)
    x, weight = torch.randn(2048, 576, dtype=dtype), torch.randn(3072, 576, dtype=dtype)
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * 576 * 3072 / best
