"""Adapting, training a little and looking at logits, for the tests of the variants."""

from pathlib import Path
from typing import Any

import torch

from finetune.lora import LoraConfig, attach
from tests.fixtures.models import load

RANK = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(variant: str, **changes: Any) -> LoraConfig:
    settings = {"rank": RANK, "alpha": 8.0, "dropout": 0.0, "targets": ["all-linear"], "dtype": "float32", **changes}
    return LoraConfig(variant=variant, **settings)


def adapt(base: Path, method: str, variant: str, documents: list[list[int]], **changes: Any) -> Any:
    settings = config(variant, **changes)
    return attach(
        load(base, method, double=method == "nf4"),
        settings,
        upcast="none",
        checkpointing=False,
        seed=1,
        calibration=documents,
        original=base,
    )


def logits(model: Any, document: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([document])).logits.float()
    return found


def train(model: Any, document: list[int], *, steps: int = 4, optimizer: Any = None) -> list[float]:
    ids = torch.tensor([document])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    model.train()
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
