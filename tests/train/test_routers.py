"""Routers are trained with the model's own auxiliary loss, and a mixture's training resumes to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import Interrupted
from tests.fixtures.mixtures import load_mixture, write_mixture
from tests.fixtures.trainings import Collected, Stopping, train

FACTOR = 0.5
"""Of the auxiliary loss, in the config.json of the test's base; a class's own, 0.001, would be lost in the loss."""

SETTINGS: dict[str, Any] = {
    "layers": "auto",
    "dtype": "float32",
    "dropout": 0.0,
    "rank": 2,
    "evaluations": 0,
    "checkpoints": 2,
    "steps": 4,
}


@pytest.fixture(scope="module")
def mixture(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    model = write_mixture(folder, "qwen3_moe", vocab_size=512)
    model.config.router_aux_loss_coef = FACTOR
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def losses(tracker: Collected) -> list[float]:
    return [metrics["train/loss"] for _, metrics in tracker.lines if "train/loss" in metrics]


def trained(folder: Path, base: Path, tokenizer: Any, **lora: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Trains a few steps; returns the saved tensors, and the loss of each step."""
    tracker = Collected()
    train(folder, tiny_base=base, tokenizer=tokenizer, trackers=tracker, lora_settings=lora, **SETTINGS)
    return load_file(folder / "train" / "adapter" / "adapter_model.safetensors"), losses(tracker)


def test_trained_routers_add_the_auxiliary_loss_and_change(mixture: Path, tmp_path: Path, tokenizer: Any) -> None:
    _, plain = trained(tmp_path / "frozen", mixture, tokenizer, experts="shared")
    saved, together = trained(tmp_path / "trained", mixture, tokenizer, experts="shared", routers=True)
    base = dict(load_mixture(mixture).named_parameters())
    routers = {name: tensor for name, tensor in saved.items() if name.endswith("mlp.gate.weight")}
    assert len(routers) == 2
    assert all(
        not torch.equal(tensor, base[name.removeprefix("base_model.model.")]) for name, tensor in routers.items()
    )
    assert sum(".experts.common_" in name for name in saved) == 2 * 3 * 2, "A and B of gate, up and down in two layers"
    # Two of four experts: balanced routers would have an auxiliary loss of 2, and one that always takes the same two 4.
    assert 2 * FACTOR <= together[0] - plain[0] <= 4 * FACTOR


def test_the_training_of_experts_and_routers_resumes_to_the_bit(mixture: Path, tmp_path: Path, tokenizer: Any) -> None:
    lora = {"experts": "shared", "routers": True}
    whole, _ = trained(tmp_path / "whole", mixture, tokenizer, **lora)
    arguments = {"tiny_base": mixture, "tokenizer": tokenizer, "lora_settings": lora, **SETTINGS}
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", trackers=Stopping(2), **arguments)
    train(tmp_path / "parts", **arguments)
    resumed = load_file(tmp_path / "parts" / "train" / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
