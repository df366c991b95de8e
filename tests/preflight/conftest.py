"""An adapted tiny model, rows prepared for it and the run's own trainer, made by the rooms themselves."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import lora
from finetune.config import load as load_config
from finetune.kernels import Fusion, KernelsConfig, apply_fusion
from finetune.launch import Ranks
from finetune.model import Base
from finetune.preflight import PreflightConfig, UpcomingRun, result_cache, run_preflight
from finetune.preflight.build_context import make_context
from finetune.preflight.context import Bench
from finetune.products import PreflightResult
from tests.quantization.test_bnb import PLACEMENT, load
from tests.rows import prepared_rows

KERNELS = KernelsConfig(layers="auto", weights="auto", loss="auto", implementation="auto", memory="plain")


@dataclasses.dataclass
class Scene:
    """All that a rehearsal starts from; a test may spoil any of it before it runs.

    Attributes:
        run: The run's folder.
        adapted: A random Llama of two layers in NF4 with a fresh adapter.
    """

    run: Path
    adapted: Any
    quick: Fusion
    tokenizer: Any
    data: Any
    base: Base
    lora: lora.LoraConfig
    ahead: UpcomingRun | None

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "adapted": self.adapted, "tokenizer": self.tokenizer, "data": self.data, "base": self.base, "lora": self.lora, "upcast": "none",
            "placement": PLACEMENT, "quick": self.quick, "seed": 1, "ahead": self.ahead,
        }  # fmt: skip

    def bench(self, level: str = "quick") -> Bench:
        work = self.run / "preflight" / "work"
        work.mkdir(parents=True, exist_ok=True)
        return make_context(settings(level), folder=work, run=self.run, **self.inputs)

    def run_preflight(self, level: str = "quick") -> PreflightResult:
        folder = self.run / "preflight"
        folder.mkdir(exist_ok=True)
        return run_preflight(settings(level), folder=folder, quantization={}, kernels=KERNELS, **self.inputs)


def settings(level: str) -> PreflightConfig:
    return load_config(["+experiment=quickstart", f"rehearse={level}", "preflight.steps=24"]).rehearse


def late_trainer(*arguments: Any, **inputs: Any) -> Any:
    from finetune.train.trainer import make_trainer

    return make_trainer(*arguments, ranks=Ranks({}), **inputs)


@pytest.fixture
def scene(tmp_path: Path, tiny_base: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Scene:
    torch.set_num_threads(1)
    monkeypatch.setattr(
        result_cache, "find", lambda name: None
    )  # bugs are planted into this process, where the name does not see them
    config = load_config(
        ["+experiment=quickstart", "model=custom", f"model.name={tiny_base}", "optim.learning_rate=5e-3", "lora.rank=4"]
    )
    adapted = lora.attach(load(tiny_base, "nf4", double=True), config.lora, upcast="none", checkpointing=False, seed=1)
    ahead = UpcomingRun(
        train=config.train, optim=config.optim, model=config.model, quantization=config.quantization, until="report",
        make_trainer=late_trainer,
    )  # fmt: skip
    return Scene(
        run=tmp_path, adapted=adapted, quick=apply_fusion(adapted, KERNELS, placement=PLACEMENT, checkpointing="none"), tokenizer=tokenizer,
        data=prepared_rows(tmp_path, tokenizer), lora=config.lora, ahead=ahead,
        base=Base(folder=tiny_base, name=str(tiny_base), revision=None, sha256="", source="folder"),
    )  # fmt: skip


Plant = Callable[[Scene, pytest.MonkeyPatch], Any]
