"""Our trainer's losses against numbers that plain transformers and peft computed once; ``losses.json`` says where."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import lora
from finetune.config import load as load_config
from finetune.kernels import apply_fusion
from finetune.launch import Ranks
from finetune.train import train_adapter
from finetune.trainable import TrainableModel, TrainingJob
from tests.fixtures.models import PLACEMENT, model_spec, quantization_config
from tests.fixtures.pairs import COMPOSED, pairs_of
from tests.fixtures.rows import prepared_rows
from tests.fixtures.trainings import Collected
from tests.golden.reference import (
    ALPHA,
    BETA,
    LEARNING_RATE,
    LOSSES,
    MAX_GRAD_NORM,
    RANK,
    STEPS,
    compute,
    digest,
    documents_of,
    fill_adapter,
    pairs_in,
)

GOLDEN = json.loads(LOSSES.read_text(encoding="utf-8"))
COMMON = [
    "optim=adamw",
    f"optim.learning_rate={LEARNING_RATE}",
    "optim.schedule=constant",
    "optim.warmup=0",
    f"optim.max_grad_norm={MAX_GRAD_NORM}",
    f"lora.rank={RANK}",
    f"lora.alpha={ALPHA}",
    f"train.steps={STEPS}",
    "train.tokens_per_step=null",
    "train.evaluation_rows=2",
    "train.evaluations=1",
    "train.checkpoints=1",
]
OVERRIDES = {
    "sft": ["+experiment=quickstart", *COMMON],
    "dpo": [*COMPOSED, *COMMON, "train.micro_batch=2", f"train.preference.beta={BETA}"],
}


@pytest.fixture
def data(objective: str, tmp_path: Path, tokenizer: Any) -> Any:
    torch.set_num_threads(1)
    return (prepared_rows if objective == "sft" else pairs_of)(tmp_path, tokenizer)


def losses_of_our_trainer(objective: str, data: Any, base: Path, tokenizer: Any) -> list[float]:
    """Trains in float32 with all documents in each step, so that their order does not matter."""
    rows = data.packed_rows if objective == "sft" else data.train_rows
    config = load_config([*OVERRIDES[objective], f"train.rows_per_step={rows}"])
    spec = model_spec(base, quantization_config("none"), placement=dataclasses.replace(PLACEMENT, dtype="float32"))
    model = lora.attach(spec.load(), config.lora, upcast="none", checkpointing=False, seed=1)
    fill_adapter(model)
    fusion = apply_fusion(model, config.kernels, placement=spec.placement, checkpointing="none")
    trainable = TrainableModel(model=model, tokenizer=tokenizer, spec=spec, lora=config.lora, fusion=fusion)
    job = TrainingJob(config=config.train, optim=config.optim, trainable=trainable, data=data, seed=1)
    trackers, folder = Collected(), data.folder.parent / "train"
    folder.mkdir()
    train_adapter(job, folder=folder, trackers=trackers, ranks=Ranks({}))
    return [metrics["train/loss"] for _, metrics in trackers.lines if "train/loss" in metrics]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_documents_are_those_of_the_golden_losses(objective: str, data: Any) -> None:
    rows: list[Any] = documents_of(data.folder) if objective == "sft" else pairs_in(data.folder)
    assert digest(rows) == GOLDEN[objective]["documents_sha256"]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_plain_transformers_and_peft_still_compute_them(objective: str, data: Any, tiny_base: Path) -> None:
    losses = compute(objective, data.folder, tiny_base)["losses"]
    assert losses == pytest.approx(GOLDEN[objective]["losses"], abs=GOLDEN["tolerance"])


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_our_trainer_gives_the_golden_losses(objective: str, data: Any, tiny_base: Path, tokenizer: Any) -> None:
    losses = losses_of_our_trainer(objective, data, tiny_base, tokenizer)
    assert losses == pytest.approx(GOLDEN[objective]["losses"], abs=GOLDEN["tolerance"])
