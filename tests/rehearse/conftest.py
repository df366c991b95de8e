"""An adapted tiny model and prepared rows for it, made by the rooms themselves."""

from pathlib import Path
from typing import Any

import pytest

from finetune import lora
from finetune.rehearse.bench import Bench
from tests.quantization.test_bnb import PLACEMENT, load
from tests.rows import prepared_rows


@pytest.fixture
def data(tmp_path: Path, tokenizer: Any) -> Any:
    return prepared_rows(tmp_path, tokenizer)


@pytest.fixture
def adapted(tiny_base: Path) -> Any:
    settings = lora.LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=["all-linear"], dtype="float32")
    return lora.attach(load(tiny_base, "nf4", double=True), settings, upcast="none", checkpointing=False, seed=1)


@pytest.fixture
def bench(adapted: Any, tokenizer: Any, data: Any) -> Bench:
    return Bench.build(adapted, tokenizer=tokenizer, data=data, placement=PLACEMENT, rows=4, seed=1)
