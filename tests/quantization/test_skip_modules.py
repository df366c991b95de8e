"""Layers in full precision: by name, and by what their rounding costs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import ModelError
from finetune.inference.kl_divergence import compare_with_reference, record_reference
from finetune.inference.rows import read_rows
from finetune.lora.init import checkpoint_reader
from finetune.quantization import QuantizationConfig, choose_skip_modules, quantized_layers
from finetune.quantization.sensitivity import MIB, SkippedLayers, choose, extra_bytes, rounding_costs
from finetune.quantization.skip_modules import is_skipped, skip_patterns
from tests.fixtures.rows import prepared_rows

NF4 = QuantizationConfig(method="nf4", double=True)
DOCUMENTS = [[5, 6, 7, 8, 9, 10, 11, 12], [30, 31, 32, 33]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def open_line(line: Any, quantization: QuantizationConfig, *, dtype: str = "float32") -> Any:
    parts = line("none", dtype=dtype)
    return dataclasses.replace(parts.spec, quantization=quantization).load()


@pytest.mark.parametrize(
    ("wish", "kept"),
    [
        ("down_proj", ["model.layers.0.mlp.down_proj", "model.layers.11.mlp.down_proj"]),
        ("model.layers.1.*", []),
        ("model.layers.0.*", ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_up_proj"]),
        ("*.gate_up_proj", ["model.layers.0.mlp.gate_up_proj"]),
        ("up_proj", []),
        ("model.layers.11.mlp.down_proj", ["model.layers.11.mlp.down_proj"]),
    ],
)
def test_a_wish_means_a_last_segment_or_a_full_name(wish: str, kept: list[str]) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_up_proj", "model.layers.11.mlp.down_proj"]
    assert [name for name in names if is_skipped(name, [wish])] == kept
    assert [name for name in names if not should_convert_module(name, skip_patterns([wish]))] == kept, (
        "transformers reads it alike"
    )
    assert [name for name in names if not should_convert_module(f"{name}.weight", skip_patterns([wish]))] == kept


def test_the_head_is_always_kept() -> None:
    assert is_skipped("lm_head", [])


@pytest.mark.parametrize("method", ["nf4", "int8", "torchao_int8", "hqq"])
def test_a_wish_that_matches_nothing_is_refused(line: Any, method: str) -> None:
    with pytest.raises(
        ModelError, match=r"quantization.skip_modules: dwn_proj match no linear layer; this model has down_proj, "
    ):
        open_line(line, QuantizationConfig(method=method, skip_modules=["dwn_proj"]))


def test_a_budget_buys_the_dearest_rounding_for_its_bytes() -> None:
    found = [
        {"layer": "large", "cost": 8.0, "bytes": 100},
        {"layer": "b", "cost": 3.0, "bytes": 30},
        {"layer": "a", "cost": 3.0, "bytes": 30},
        {"layer": "cheap", "cost": 1.0, "bytes": 20},
    ]
    kept, left = choose(found, budget=80)
    assert [one["layer"] for one in kept] == ["a", "b", "cheap"]
    assert left is not None
    assert left["layer"] == "large"


def test_bytes_are_those_that_full_precision_takes_more(line: Any) -> None:
    layer = quantized_layers(open_line(line, NF4, dtype="bfloat16"))["model.layers.0.mlp.down_proj"]
    weights = 64 * 128
    assert (
        extra_bytes(layer, 2) == 2 * weights - weights // 2 - weights // 64 - 4
    )  # a byte a block, and one float32 for 256 of them


def test_costs_foretell_what_rounding_one_layer_does(line: Any, heldout: Any, tmp_path: Path) -> None:
    """Ranks of the predicted and the measured divergence agree, layer by layer rounded alone."""
    rows = read_rows(heldout.folder / "heldout")[:4]
    dense = open_line(line, QuantizationConfig(method="none"))
    reference = record_reference(dense, rows, tmp_path / "reference.f32", batch_tokens=512)
    rounded = open_line(line, NF4)
    base = line("none").spec.base.folder
    costs = rounding_costs(rounded, checkpoint_reader(base), [row["input_ids"] for row in rows])
    measured = {}
    for name in costs:
        others = [other for other in costs if other != name]
        measured[name] = compare_with_reference(
            open_line(line, dataclasses.replace(NF4, skip_modules=others)), rows, reference, batch_tokens=512
        ).kl
    names = sorted(costs)
    ranks = [
        torch.tensor([float(some[name]) for name in names]).argsort().argsort().float() for some in (costs, measured)
    ]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.6
    assert all(cost > 0 for cost in costs.values())


def test_costs_are_the_same_again_and_leave_the_model_as_it_was(line: Any) -> None:
    model, base = open_line(line, NF4), line("none").spec.base.folder
    before = model(input_ids=torch.tensor(DOCUMENTS[:1])).logits
    first, second = (rounding_costs(model, checkpoint_reader(base), DOCUMENTS) for _ in range(2))
    assert first == second
    assert torch.equal(before, model(input_ids=torch.tensor(DOCUMENTS[:1])).logits)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_stage_names_the_layers_it_kept_and_a_loader_keeps_them(
    line: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, data = line("none"), prepared_rows(tmp_path, tokenizer)
    config = dataclasses.replace(NF4, skip_modules_mib=0.03, skip_modules_tokens=64)
    kept = choose_skip_modules(dataclasses.replace(parts.spec, quantization=config), folder=tmp_path, data=data)
    assert 0 < sum(one["bytes"] for one in kept.layers) <= 0.03 * MIB
    assert "stay in full precision and take" in " ".join(capsys.readouterr().out.split())
    applied = kept.apply_to(config)
    assert applied.skip_modules_mib == 0
    loaded = open_line(line, applied, dtype="bfloat16")
    original = load_file(parts.spec.base.folder / "model.safetensors")
    for one in kept.layers:
        assert one["layer"] not in quantized_layers(loaded)
        assert torch.equal(loaded.get_submodule(one["layer"]).weight, original[f"{one['layer']}.weight"])
    assert len(quantized_layers(loaded)) == 14 - len(kept.layers)


def test_a_budget_below_the_smallest_layer_is_refused(line: Any, tokenizer: Any, tmp_path: Path) -> None:
    parts, data = line("none"), prepared_rows(tmp_path, tokenizer)
    config = dataclasses.replace(NF4, skip_modules_mib=0.001, skip_modules_tokens=32)
    with pytest.raises(ModelError, match=r"quantization.skip_modules_mib=0.001 is less than the smallest layer takes"):
        choose_skip_modules(dataclasses.replace(parts.spec, quantization=config), folder=tmp_path, data=data)


def test_chosen_layers_come_after_those_kept_by_name() -> None:
    kept = SkippedLayers(
        folder=Path(),
        layers=[{"layer": "model.layers.0.mlp.down_proj", "cost": 1.0, "bytes": 1}],
        next_best=None,
        tokens=1,
    )
    config = QuantizationConfig(method="nf4", skip_modules=["o_proj"], skip_modules_mib=1.0)
    assert kept.apply_to(config).skip_modules == ["o_proj", "model.layers.0.mlp.down_proj"]
