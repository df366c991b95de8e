"""4-bit layers must survive an evaluation: on AVX512-BF16 CPUs bitsandbytes 0.50.2 would repack them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune.errors import ModelError
from finetune.model.load import parameter_count, resident_bytes
from finetune.quantization import QuantizationConfig, quantized_layers, spec
from finetune.quantization.bnb import prevent_repacking
from tests.fixtures.models import load, model_spec, quantization_config


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
    assert prevent_repacking(loaded) == 14


def test_the_head_stays_in_full_precision(tiny_base: Path) -> None:
    loaded = load(tiny_base, "nf4")
    assert "lm_head" not in quantized_layers(loaded)
    assert loaded.get_output_embeddings().weight.dtype == torch.bfloat16


def test_parameters_are_counted_as_if_dense(tiny_base: Path) -> None:
    dense, quantized = load(tiny_base, "none"), load(tiny_base, "nf4", double=True)
    assert parameter_count(quantized) == parameter_count(dense) == sum(p.numel() for p in dense.parameters())


def test_4_bit_weights_take_fewer_bytes_than_dense_ones(tiny_base: Path) -> None:
    nf4, fp4, dense = (resident_bytes(load(tiny_base, method)) for method in ("nf4", "fp4", "none"))
    assert nf4 == fp4 < dense


def test_int8_loads_and_answers(tiny_base: Path) -> None:
    loaded = load(tiny_base, "int8")
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_the_specification_names_what_a_loader_needs() -> None:
    assert spec(quantization_config("nf4", double=True)) == {
        "method": "nf4",
        "double": True,
        "blocksize": 64,
        "keep": [],
    }
    assert spec(quantization_config("none")) == {"method": "none"}


def test_double_quantization_without_4_bits_is_a_problem() -> None:
    assert list(quantization_config("int8", double=True).problems()) == [
        "quantization.double is for nf4, fp4, qat; got method 'int8': set quantization.double=false"
    ]


def test_rows_that_the_cpu_would_read_as_noise_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    narrow = {
        name: tensor[:96] if "gate" in name or "up_proj" in name else tensor[:, :96] if "down" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in narrow.items()},
        tmp_path / "base" / "model.safetensors",
        metadata={"format": "pt"},
    )
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**settings, "intermediate_size": 96}))
    with pytest.raises(
        ModelError,
        match=r"not a multiple of 64, as in down_proj; leave these unquantized with "
        r"quantization.skip_modules=\[down_proj\]",
    ):
        load(tmp_path / "base", "nf4")
    skipped = QuantizationConfig(method="nf4", skip_modules=["down_proj"])
    assert quantized_layers(model_spec(tmp_path / "base", skipped).load())


def test_reading_back_is_the_code_book_times_the_constant(tiny_base: Path) -> None:
    from bitsandbytes.functional import get_4bit_type
    from safetensors.torch import load_file

    from finetune.quantization.backends import dense

    code = get_4bit_type("nf4", device="cpu").float()
    weights = load_file(tiny_base / "model.safetensors")
    for name, layer in quantized_layers(load(tiny_base, "nf4")).items():
        groups = weights[f"{name}.weight"].float().reshape(-1, 64)
        tops = groups.abs().amax(-1, keepdim=True)
        nearest = code[(groups / tops)[..., None].sub(code).abs().argmin(-1)] * tops
        assert torch.allclose(dense(layer, torch.float32).reshape(-1, 64), nearest, atol=1e-2 * float(tops.max()))
