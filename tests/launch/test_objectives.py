"""Several processes with gloo, where a step is more than a sum over rows: sampled groups, and the z0 of KTO."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.pairs import KTO, pairs_of
from tests.fixtures.preference_training import prepare_once
from tests.fixtures.processes import TOLERANCE, codes, curve, train_in_turn
from tests.fixtures.prompts import GRPO, SETTINGS, prompts_of, samples_of

STEPS = ["train.steps=3", "train.evaluations=1", "train.checkpoints=0"]
KTO_STEPS = [*STEPS, "train.preference.undesirable_weight=0.05"]
"""Desirable answers weigh most, so that z0 is above 0 after the first step."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tokenizer: Any) -> dict[int, Path]:
    """Both trainings by one and by two processes."""
    folders = {count: tmp_path_factory.mktemp(f"by-{count}") for count in (1, 2)}
    for count, folder in folders.items():
        grpo, kto = folder / "grpo", folder / "kto"
        prepare_once(grpo, partial(prompts_of, grpo, tokenizer, composed=[*GRPO, *SETTINGS]))
        prepare_once(kto, partial(pairs_of, kto, tokenizer, composed=KTO))
        asked = [(grpo, {"objective": "grpo", "overrides": STEPS}), (kto, {"objective": "kto", "overrides": KTO_STEPS})]
        for code, output in train_in_turn(tiny_base, tokenizer, asked, count=count):
            assert (code, codes(output)) == (0, [0, 0]), output
    return folders


def test_several_processes_sample_what_one_does(runs: dict[int, Path]) -> None:
    """24 answers in micro-batches of 8 do not divide by two processes, so each group lies in both."""
    one, two = (samples_of(folder / "grpo") for folder in runs.values())
    assert len(one) == 3 * 24
    names = ("step", "row", "number", "answer", "advantage")
    assert [[line[name] for name in names] for line in one] == [[line[name] for name in names] for line in two]
    assert any(line["advantage"] for line in one), "without a difference there is nothing to learn"


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        ("grpo", ("train/reward", "train/grad_norm", "train/kl", "train/dead_groups", "eval/reward")),
        ("kto", ("train/loss", "train/grad_norm", "train/kl", "eval/loss", "eval/reward_margin_low")),
    ],
)
def test_they_learn_what_one_does(objective: str, names: tuple[str, ...], runs: dict[int, Path]) -> None:
    one, two = (folder / objective for folder in runs.values())
    for name in names:
        expected = curve(one, name)
        assert any(expected), name
        assert curve(two, name) == pytest.approx(expected, abs=TOLERANCE), name
    adapters = [load_file(folder / "train/adapter/adapter_model.safetensors") for folder in (one, two)]
    assert any(bool(tensor.any()) for name, tensor in adapters[0].items() if "lora_B" in name)
    flat = [torch.cat([part.flatten() for _, part in sorted(adapter.items())]) for adapter in adapters]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 1e-3
