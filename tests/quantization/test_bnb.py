"""4-bit layers must survive an evaluation: on AVX512-BF16 CPUs bitsandbytes 0.50.2 would repack them."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import model
from finetune.hardware import Placement
from finetune.quantization import QuantizationConfig, protect, quantized_layers, spec

PLACEMENT = Placement(device="cpu", dtype="bfloat16", attention="sdpa", optimizer="adamw_8bit", optimizer_why="", threads=1, reasons=())


def config(method: str, *, double: bool = False) -> QuantizationConfig:
    return QuantizationConfig(method=method, double=double, skip=[], threshold=6.0)


def load(folder: Path, method: str, *, double: bool = False) -> Any:
    base = model.Base(folder=folder, name="tiny", revision=None, sha256="", source="folder")
    settings = types.SimpleNamespace(name="tiny", trust_remote_code=False)
    return model.load(base, settings, quantization=config(method, double=double), placement=PLACEMENT)  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_weights_are_the_same_bytes_after_an_evaluation(tiny_base: Path, method: str, double: bool) -> None:
    loaded = load(tiny_base, method, double=double)
    before = {name: layer.weight.data.clone() for name, layer in quantized_layers(loaded).items()}
    with torch.no_grad():
        loaded(input_ids=torch.tensor([[5, 6, 7, 8]]))
    after = {name: layer.weight.data for name, layer in quantized_layers(loaded).items()}
    assert before.keys() == after.keys()
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_4bit_layer_is_protected_by_loading(tiny_base: Path) -> None:
    loaded = load(tiny_base, "nf4", double=True)
    layers = quantized_layers(loaded)
    assert len(layers) == 14, "two blocks of seven linear layers"
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    assert protect(loaded) == 14


def test_the_head_stays_in_full_precision(tiny_base: Path) -> None:
    loaded = load(tiny_base, "nf4")
    assert "lm_head" not in quantized_layers(loaded)
    assert loaded.get_output_embeddings().weight.dtype == torch.bfloat16


def test_parameters_are_counted_as_if_dense(tiny_base: Path) -> None:
    dense, quantized = load(tiny_base, "none"), load(tiny_base, "nf4", double=True)
    assert model.parameter_count(quantized) == model.parameter_count(dense) == sum(p.numel() for p in dense.parameters())


def test_4_bit_weights_take_fewer_bytes_than_dense_ones(tiny_base: Path) -> None:
    nf4, fp4, dense = (model.resident_bytes(load(tiny_base, method)) for method in ("nf4", "fp4", "none"))
    assert nf4 == fp4 < dense


def test_int8_loads_and_answers(tiny_base: Path) -> None:
    loaded = load(tiny_base, "int8")
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_the_specification_names_what_a_loader_needs() -> None:
    assert spec(config("nf4", double=True)) == {"method": "nf4", "double": True, "blocksize": 64, "skip": []}
    assert spec(config("none")) == {"method": "none"}


def test_double_quantization_without_4_bits_is_a_problem() -> None:
    assert list(config("int8", double=True).problems()) == [
        "quantization.double is for nf4 and fp4; got method 'int8': set quantization.double=false"
    ]
