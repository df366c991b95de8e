"""A checkpoint in few bits is the one that was saved, and what its rounding costs is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError
from finetune.export import load
from finetune.inference.adapted import load_adapted_model
from finetune.merge.adapter_deltas import read_changes
from finetune.merge.candidates import build
from finetune.products import Exports
from finetune.quantization import quantized_layers
from finetune.quantization.bnb import prevent_repacking
from tests.fixtures.artifacts import Line, Made
from tests.fixtures.exports import Facts
from tests.fixtures.graphs import weights_of


@pytest.fixture(scope="module")
def dequantized_merge(
    line: Callable[..., Line], adapter: Made, merged: Facts, tmp_path_factory: pytest.TempPathFactory
) -> Facts:
    """The merged model as most runs leave it: adapter and base as the base was in 4 bits."""
    parts, folder = line(), tmp_path_factory.mktemp("merged")
    graph = load_adapted_model(parts.spec, adapter.folder / "adapter")
    changes = read_changes(adapter.folder / "adapter")
    build(parts.spec.base.folder, changes, folder / "model", dtype=torch.bfloat16, source=weights_of(graph))
    for file in (merged.folder / "model").iterdir():
        if not (folder / "model" / file.name).exists():
            shutil.copyfile(file, folder / "model" / file.name)
    shutil.copyfile(merged.folder / "model" / "generation_config.json", folder / "model" / "generation_config.json")
    return Facts(folder=folder, chosen="dequantized")


@pytest.fixture(scope="module")
def exported(
    run: Callable[..., Exports], dequantized_merge: Facts, tmp_path_factory: pytest.TempPathFactory
) -> Exports:
    return run(tmp_path_factory.mktemp("run") / "export", "bitsandbytes", from_merged=dequantized_merge)


def test_checkpoint_is_what_was_quantized_and_its_cost_is_said(exported: Exports) -> None:
    (one,) = exported.exports
    assert "bitsandbytes" in one.parity.runtime
    assert one.parity.max_logit_difference < 0.2
    cost = one.parity.cost
    assert cost.kl > 10 * one.parity.kl
    assert cost.loss_difference.low <= cost.loss_difference.difference <= cost.loss_difference.high
    assert f"KL {cost.kl:.4f}" in cost.note


def quantized(folder: Path) -> Any:
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings)
    prevent_repacking(model)
    return model


def test_originals_with_the_adapter_are_rounded_and_saved_before_they_run(exported: Exports, merged: Facts) -> None:
    """bitsandbytes repacks 4-bit weights in place at the first evaluation on some CPUs; saving after that is noise."""
    saved, fresh = (
        AutoModelForCausalLM.from_pretrained(exported.folder / "bitsandbytes", dtype=torch.bfloat16),
        quantized(merged.folder / "model"),
    )
    prevent_repacking(saved)
    settings = json.loads((exported.folder / "bitsandbytes" / "config.json").read_text())["quantization_config"]
    assert (settings["bnb_4bit_quant_type"], settings["bnb_4bit_use_double_quant"]) == ("nf4", True)
    layers = quantized_layers(saved)
    assert layers
    for name, layer in quantized_layers(fresh).items():
        same = (layer.weight.data == layers[name].weight.data).float().mean()
        assert same > 0.98, f"{name}: peft adds in other numbers than our merge, so a few weights round the other way"


def test_rounding_the_dequantized_merge_again_would_take_the_adapter_off(
    exported: Exports, dequantized_merge: Facts, line: Callable[..., Line], adapter: Made
) -> None:
    """The planted bug: its weights lie on the 4-bit grid, so rounding undoes what the adapter added."""
    base = quantized(line().spec.base.folder)
    again, ours = (
        quantized(dequantized_merge.folder / "model"),
        quantized_layers(AutoModelForCausalLM.from_pretrained(exported.folder / "bitsandbytes")),
    )
    layers, lost = quantized_layers(again), []
    for name, layer in quantized_layers(base).items():
        lost.append(
            (
                (layer.weight.data == layers[name].weight.data).float().mean(),
                (layer.weight.data == ours[name].weight.data).float().mean(),
            )
        )
    assert all(one > other for one, other in lost)


def test_loader_opens_the_checkpoint(exported: Exports) -> None:
    model, tokenizer = load(exported.folder / "bitsandbytes")
    assert quantized_layers(model)
    assert tokenizer.chat_template


@pytest.mark.parametrize("method", ["fp4", "int8"])
def test_other_methods_are_written_too(run: Callable[..., Exports], tmp_path: Path, method: str) -> None:
    (one,) = run(tmp_path / "export", "bitsandbytes", dtype=method).exports
    assert one.parity.passed
    settings: dict[str, Any] = json.loads((tmp_path / "export" / "bitsandbytes" / "config.json").read_text())[
        "quantization_config"
    ]
    assert settings["load_in_8bit"] == (method == "int8")


def test_several_adapters_in_the_dequantized_base_are_refused(
    run: Callable[..., Exports],
    dequantized_merge: Facts,
    tmp_path: Path,
) -> None:
    several = Facts(folder=dequantized_merge.folder, chosen="dequantized", adapters={"another": 0.5})
    with pytest.raises(ExportError, match=r"several adapters were merged .* set merge.choose=original"):
        run(tmp_path / "export", "bitsandbytes", from_merged=several)
