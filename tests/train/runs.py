"""Small trainings that the tests of this room share."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune import lora
from finetune.config import load as load_config
from finetune.kernels import apply_fusion
from finetune.launch import Ranks
from finetune.launch.shards import PLAIN
from finetune.model import Base
from finetune.products import PreparedData, TrainedAdapter
from finetune.train import assist, fit
from tests.quantization.test_bnb import PLACEMENT, load
from tests.rows import prepared_rows


class Collected:
    """A tracker that only remembers; the real ones have tests of their own."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))


def untouched(_: Any) -> None:
    """What a test does to the adapted model, here nothing."""


def train(
    folder: Path, *, tiny_base: Path, tokenizer: Any, trackers: Any = None, touch: Callable[[Any], object] = untouched,
    packing: bool = True, rank: int = 8, dropout: float = 0.1, fingerprint: str = "", ranks: Ranks | None = None,
    plain: bool = False, layers: str = "auto", **changes: Any,
) -> TrainedAdapter:  # fmt: skip
    """Twelve steps on packed rows, from a fresh 4-bit base; of several processes, the others return None."""
    ranks = ranks or Ranks({})
    torch.set_num_threads(1)  # whatever a test of the whole line has set before: the same sums in the same order
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        prepared_rows(folder, tokenizer)
    config = load_config(["+experiment=quickstart"])
    settings = dataclasses.replace(config.train, **{
        "epochs": 1.0, "steps": 12, "micro_batch": 1, "tokens_per_step": 200, "rows_per_step": None, "checkpointing": "none",
        "offload": False, "group_by_length": False, "neftune_alpha": None, "keep": "last", "patience": None, "non_finite_steps": 3,
        "evaluations": 3, "evaluation_rows": 8, "checkpoints": 3, "keep_checkpoints": 5, "log_steps": 1, "deterministic": False, **changes,
    })  # fmt: skip
    optim = dataclasses.replace(
        config.optim, learning_rate=5e-3, schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0
    )
    adapter = dataclasses.replace(
        config.lora, rank=rank, alpha=16.0, dropout=dropout, targets=["all-linear"], dtype="float32"
    )
    adapted = lora.attach(
        load(tiny_base, "nf4", double=True),
        adapter,
        upcast="none",
        checkpointing=settings.checkpointing == "full",
        seed=1,
    )
    if plain:
        config.kernels = load_config(["+experiment=quickstart", "kernels=plain"]).kernels
    elif layers != "auto":
        config.kernels.layers = layers
    fusion_obstacle = PLAIN if ranks.shards else None
    quick = apply_fusion(
        adapted,
        config.kernels,
        placement=PLACEMENT,
        checkpointing=settings.checkpointing,
        fusion_obstacle=fusion_obstacle,
    )
    rows = sum(1 for _ in (folder / "train.jsonl").read_text().splitlines())
    data = PreparedData(
        folder=folder / "data", rows={}, tokens=1101, trained_tokens=310, packed_rows=10, train_rows=rows, heldout_rows=12, longest=128,
        fingerprint=fingerprint, warnings=[], lengths={},
    )  # fmt: skip
    (folder / "train").mkdir(exist_ok=True)
    touch(adapted)
    base = Base(folder=tiny_base, name="tiny", revision=None, sha256="", source="folder")
    graph: dict[str, Any] = {
        "base": base,
        "quantization": {},
        "lora": adapter,
        "upcast": "none",
        "placement": PLACEMENT,
    }
    given: dict[str, Any] = {
        "data": data,
        "packing": packing,
        "seed": 1,
        "quick": quick,
        "ranks": ranks,
    }
    given |= {"adapted": adapted, "tokenizer": tokenizer, "optim": optim, **graph}
    if not ranks.is_main:
        return assist(config=settings, **given)  # type: ignore[func-returns-value]
    return fit(settings, folder=folder / "train", trackers=trackers or Collected(), kernels=config.kernels, **given)


class Stopping(Collected):
    """Sends this process a signal at a step, as a scheduler would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step == self.step and "train/loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)
