"""Training on a tiny model: it learns, it is the same twice, and what was interrupted ends as if it had not been."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import lora
from finetune.config import load as load_config
from finetune.errors import Interrupted, TrainError
from finetune.model import Base
from finetune.optim import OptimConfig
from finetune.train import TrainConfig, TrainedAdapter, fit
from finetune.train.fit import last_checkpoint, mean_of_last_tenth
from tests.quantization.test_bnb import PLACEMENT, load
from tests.rows import prepared_rows


class Collected:
    """A tracker that only remembers; the real ones have tests of their own."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))


def train(folder: Path, *, tiny_base: Path, tokenizer: Any, trackers: Any = None, **changes: Any) -> TrainedAdapter:
    """Twelve steps on packed rows, from a fresh 4-bit base."""
    torch.set_num_threads(1)  # whatever a test of the whole line has set before: the same sums in the same order
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        prepared_rows(folder, tokenizer)
    config = load_config(["+experiment=quickstart"])
    settings = TrainConfig(**{
        "epochs": 1.0, "steps": 12, "micro_batch": 1, "tokens_per_step": 200, "rows_per_step": None, "checkpointing": "none",
        "evaluations": 3, "evaluation_rows": 8, "checkpoints": 3, "keep_checkpoints": 5, "log_steps": 1, "deterministic": False, **changes,
    })  # fmt: skip
    optim = OptimConfig(
        name="paged_adamw_8bit",
        learning_rate=5e-3,
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta1=0.9,
        beta2=0.999,
    )
    adapter = lora.LoraConfig(rank=8, alpha=16.0, dropout=0.1, targets=["all-linear"], dtype="float32")
    adapted = lora.attach(
        load(tiny_base, "nf4", double=True), adapter, upcast="none", checkpointing=settings.checkpointing == "full", seed=1
    )
    from finetune.data import PreparedData

    rows = sum(1 for _ in (folder / "train.jsonl").read_text().splitlines())
    data = PreparedData(
        folder=folder / "data", rows={}, tokens=1101, trained_tokens=310, packed_rows=10, train_rows=rows, heldout_rows=12, longest=128,
        fingerprint="", warnings=[], lengths={},
    )  # fmt: skip
    (folder / "train").mkdir(exist_ok=True)
    base = Base(folder=tiny_base, name="tiny", revision=None, sha256="", source="folder")
    graph: dict[str, Any] = {"base": base, "quantization": {}, "lora": adapter, "upcast": "none", "placement": PLACEMENT}
    given: dict[str, Any] = {"data": data, "packing": config.data.packing, "seed": 1, "trackers": trackers or Collected()}
    return fit(settings, folder=folder / "train", adapted=adapted, tokenizer=tokenizer, optim=optim, **graph, **given)


def test_training_learns_and_leaves_a_plain_peft_adapter(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    trackers = Collected()
    trained = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, trackers=trackers)
    assert trained.steps == 12
    assert trained.final_loss < trained.first_loss - 0.3
    assert sorted(path.name for path in trained.adapter.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert trained.optimizer["asked"] == "paged_adamw_8bit"
    assert trained.optimizer["state_bytes"] > 0
    assert {name for _, line in trackers.lines for name in line} >= {"train/loss", "eval/loss", "train/learning_rate", "train/grad_norm"}


def test_adapter_keeps_the_numbers_that_were_asked_for(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    from safetensors.torch import load_file

    trained = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, steps=2)
    assert {str(tensor.dtype) for tensor in load_file(trained.adapter / "adapter_model.safetensors").values()} == {"torch.float32"}


def test_same_seed_gives_the_same_losses_and_the_same_file(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    first, second = (train(tmp_path / name, tiny_base=tiny_base, tokenizer=tokenizer) for name in "ab")
    assert [line.get("train/loss") for line in first.curve] == [line.get("train/loss") for line in second.curve]
    assert first.adapter_sha256 == second.adapter_sha256


def test_evaluations_during_training_do_not_change_it(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    with_evaluations = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer)
    without = train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, evaluations=0)
    assert with_evaluations.adapter_sha256 == without.adapter_sha256


class Stopping(Collected):
    """Sends this process a signal at a step, as a scheduler would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step == self.step and "train/loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)


def test_interrupted_and_resumed_ends_as_if_it_had_not_been(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    whole = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 6, which is saved"):
        train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Stopping(5))
    resumed = train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer)
    assert resumed.resumed_from == 6
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert (resumed.tokens, resumed.trained_tokens) == (whole.tokens, whole.trained_tokens)


def test_unfinished_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for name, files in (("checkpoint-4", ["trainer_state.json"]), ("checkpoint-8", ["adapter_model.safetensors"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from finetune.train.callbacks import Divergence

    with pytest.raises(TrainError, match="loss is nan at step 3"):
        Divergence().on_log(None, SimpleNamespace(global_step=3), None, logs={"loss": float("nan")})


def test_final_loss_is_a_mean_of_the_end() -> None:
    assert mean_of_last_tenth([9.0] * 18 + [1.0, 2.0]) == 1.5
    assert mean_of_last_tenth([4.0]) == 4.0


def test_metrics_file_holds_one_json_object_a_line(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    trained = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, steps=3)
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
