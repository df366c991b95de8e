"""Training on rewards with several processes: each samples its share of the groups, and the step is that of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.processes import TOLERANCE, curve, train_together
from tests.fixtures.prompts import prepare_once, samples_of

SETTINGS = {"rewards": True, "overrides": ["train.steps=3", "train.evaluations=1", "train.checkpoints=0"]}


def test_several_processes_sample_and_learn_what_one_does(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    """24 answers in micro-batches of 8 do not divide by two processes, so each group lies in both."""
    folders = {count: tmp_path / str(count) for count in (1, 2)}
    for count, folder in folders.items():
        prepare_once(folder, tokenizer)
        ended = train_together(folder, tiny_base, tokenizer, count=count, **SETTINGS)
        assert [code for code, _ in ended] == [0] * count, ended
    one, two = (samples_of(folder) for folder in folders.values())
    assert len(one) == 3 * 24
    key = [(line["step"], line["row"], line["number"], line["answer"], line["advantage"]) for line in one]
    assert key == [(line["step"], line["row"], line["number"], line["answer"], line["advantage"]) for line in two]
    assert any(line["advantage"] for line in one), "without a difference there is nothing to learn"
    for name in ("train/reward", "train/grad_norm", "train/kl", "train/dead_groups", "eval/reward"):
        expected = curve(folders[1], name)
        assert expected
        assert curve(folders[2], name) == pytest.approx(expected, abs=TOLERANCE), name
    adapters = [load_file(folder / "train/adapter/adapter_model.safetensors") for folder in folders.values()]
    assert any(bool(tensor.any()) for name, tensor in adapters[0].items() if "lora_B" in name)
    flat = [torch.cat([part.flatten() for _, part in sorted(adapter.items())]) for adapter in adapters]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 1e-3
