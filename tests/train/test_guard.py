"""A non-finite loss or gradient never reaches the adapter, and the message names where it appeared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune.errors import TrainError
from tests.fixtures.trainings import train

LAYER = "layers.0.mlp.down_proj"


def breaking(calls: set[int], *, gradient: bool, layer: str = LAYER) -> Callable[[Any], None]:
    """Puts NaN into the output of a layer, or only into its gradient, at some of its calls while training."""

    def touch(model: Any) -> None:
        module = next(module for name, module in model.named_modules() if name.endswith(layer))
        count = 0

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            nonlocal count
            if not module.training:
                return output
            count += 1
            if count not in calls:
                return output
            if not gradient:
                return output * float("nan")
            output.register_hook(lambda incoming: incoming * float("nan"))
            return output

        module.register_forward_hook(hook)

    return touch


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "train" / "checkpoints" / f"checkpoint-{step}"


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("packing", [False, True])
def test_non_finite_step_leaves_adapter_and_optimizer_unchanged(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, gradient: bool, packing: bool
) -> None:
    trained = train(
        tmp_path,
        tiny_base=tiny_base,
        tokenizer=tokenizer,
        packing=packing,
        touch=breaking({5}, gradient=gradient),
        layers="plain",
        steps=6,
        checkpoints=6,
        keep_checkpoints=9,
    )
    before, after, later = (load_file(checkpoint(tmp_path, step) / "adapter_model.safetensors") for step in (2, 3, 4))
    assert all((before[name] == after[name]).all() for name in before)
    assert any((after[name] != later[name]).any() for name in after), "later steps are taken again"
    assert (checkpoint(tmp_path, 2) / "optimizer.pt").read_bytes() == (
        checkpoint(tmp_path, 3) / "optimizer.pt"
    ).read_bytes()
    assert trained.skipped_steps == 1
    assert trained.steps == 6


def test_skipped_step_is_counted_in_the_figures_and_shows_no_loss(
    tmp_path: Path, tiny_base: Path, tokenizer: Any
) -> None:
    train(
        tmp_path,
        tiny_base=tiny_base,
        tokenizer=tokenizer,
        touch=breaking({5}, gradient=False),
        layers="plain",
        steps=4,
        evaluations=0,
    )
    text = (tmp_path / "train" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["step"], line["train/skipped_steps"], "train/loss" in line) for line in lines] == [
        (1, 0, True),
        (2, 0, True),
        (3, 1, False),
        (4, 1, True),
    ]


@pytest.mark.parametrize(
    ("gradient", "what"),
    [
        (False, rf"the loss is nan; the forward pass first goes wrong at model.{LAYER}; it read rows \d+, \d+"),
        (
            True,
            r"the loss is finite, and the gradient's norm is nan; "
            rf"the backward pass first goes wrong at model.{LAYER}.lora_B",
        ),
    ],
)
def test_many_in_a_row_stop_the_run_with_layer_and_rows(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, gradient: bool, what: str
) -> None:
    touch = breaking(set(range(5, 99)), gradient=gradient)
    with pytest.raises(TrainError, match=what) as stopped:
        train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, touch=touch, layers="plain")
    assert "3 steps in a row" in str(stopped.value)
    assert "At step 5 " in str(stopped.value)


def test_steps_skipped_now_and_then_do_not_stop_the_run(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    touch = breaking({3, 5, 9, 11}, gradient=True)
    trained = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, touch=touch, layers="plain")
    assert trained.skipped_steps == 4


def test_fused_layers_are_named_too(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    touch = breaking(set(range(5, 99)), gradient=False, layer="layers.0.mlp")
    with pytest.raises(TrainError, match=r"the forward pass first goes wrong at model\.layers\.0\.mlp; it read rows"):
        train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, touch=touch, dropout=0.0)
