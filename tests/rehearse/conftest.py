"""An adapted tiny model and prepared rows for it, made by the rooms themselves."""

from pathlib import Path
from typing import Any

import pytest

from finetune import lora
from finetune.rehearse.bench import Bench
from finetune.speed import Quick, SpeedConfig, quicken
from tests.quantization.test_bnb import PLACEMENT, load
from tests.rows import prepared_rows

SPEED = SpeedConfig(layers="auto", weights="auto", loss="auto", kernels="auto", memory="plain")


@pytest.fixture
def data(tmp_path: Path, tokenizer: Any) -> Any:
    return prepared_rows(tmp_path, tokenizer)


@pytest.fixture
def adapted(tiny_base: Path) -> Any:
    settings = lora.LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=["all-linear"], dtype="float32")
    return lora.attach(load(tiny_base, "nf4", double=True), settings, upcast="none", checkpointing=False, seed=1)


@pytest.fixture
def quick(adapted: Any) -> Quick:
    return quicken(adapted, SPEED, placement=PLACEMENT, checkpointing="none")


@pytest.fixture
def bench(adapted: Any, quick: Quick, tokenizer: Any, data: Any) -> Bench:
    return Bench.build(adapted, tokenizer=tokenizer, data=data, placement=PLACEMENT, quick=quick, rows=4, step0_bound=0.0, seed=1)
