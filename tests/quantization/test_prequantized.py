"""Bases that are stored quantized: decoded, tuned, merged and opened again, against weights that the tests packed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import lora
from finetune.errors import ModelError
from finetune.kernels import apply_fusion
from finetune.lora import LoraConfig
from finetune.merge.adapter_deltas import Change, LowRank
from finetune.merge.candidates import build
from finetune.merge.graph import stored
from finetune.merge.prequantized import packed_base
from finetune.model import ModelSpec
from finetune.model.load import parameter_count, resident_bytes
from finetune.quantization import quantized_layers
from finetune.quantization.backends import dense
from tests.fixtures.models import PLACEMENT, model_spec, quantization_config
from tests.fixtures.preflight import KERNELS
from tests.fixtures.quantized_bases import FORMS, gptq, write_quantized, write_twin

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
FLOAT32 = dataclasses.replace(PLACEMENT, dtype="float32")


def prequantized(folder: Path, placement: Any = PLACEMENT) -> ModelSpec:
    return model_spec(folder, quantization_config("prequantized"), placement=placement)


def attach(model: Any) -> Any:
    settings = LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=["all-linear"], dtype="float32")
    adapted = lora.attach(model, settings, upcast="none", checkpointing=False, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    return adapted


def gradients(adapted: Any, *, dtype: str) -> dict[str, torch.Tensor]:
    adapted.train()
    adapted.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_those_that_were_packed(tmp_path: Path, tiny_base: Path, name: str) -> None:
    weights = write_quantized(tiny_base, tmp_path / "base", FORMS[name])
    spec = prequantized(tmp_path / "base")
    layers = packed_base(spec)
    assert layers is not None
    assert {f"{layer}.weight" for layer in layers.keys} == set(weights)
    loaded = spec.load()
    held = quantized_layers(loaded)
    for key, weight in weights.items():
        layer = key.removesuffix(".weight")
        assert torch.equal(dense(held[layer]), weight.to(torch.bfloat16)), key
        assert torch.equal(layers.dense(layer), weight.to(torch.bfloat16)), key
        assert layers.shape(layer) == tuple(weight.shape)


@pytest.mark.parametrize("name", ["gptq 3 bits", "gptq desc_act", "awq", "int4 asymmetric", "FP8 blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_a_dense_twin_also_after_an_evaluation(
    tmp_path: Path, tiny_base: Path, name: str, dtype: str
) -> None:
    weights = write_quantized(tiny_base, tmp_path / "base", FORMS[name])
    twin_folder = write_twin(tiny_base, tmp_path / "twin", weights, getattr(torch, dtype))
    placement = dataclasses.replace(PLACEMENT, dtype=dtype)
    twin = attach(model_spec(twin_folder, quantization_config("none"), placement=placement).load())
    packed = attach(prequantized(tmp_path / "base", placement).load())
    wanted = gradients(twin, dtype=dtype)
    assert len(wanted) == 28
    assert all(float(grad.norm()) > 0 for grad in wanted.values())
    for _ in range(2):
        found = gradients(packed, dtype=dtype)
        assert found.keys() == wanted.keys()
        for key, grad in found.items():
            torch.testing.assert_close(grad, wanted[key], rtol=0, atol=0, msg=key)
        with torch.no_grad():
            torch.testing.assert_close(
                packed.eval()(input_ids=IDS).logits, twin.eval()(input_ids=IDS).logits, rtol=0, atol=0
            )


def test_fused_layers_give_the_gradients_of_a_fused_twin(tmp_path: Path, tiny_base: Path) -> None:
    weights = write_quantized(tiny_base, tmp_path / "base", FORMS["gptq 4 bits"])
    twin_folder = write_twin(tiny_base, tmp_path / "twin", weights, torch.float32)
    found = []
    for spec in (
        model_spec(twin_folder, quantization_config("none"), placement=FLOAT32),
        prequantized(tmp_path / "base", FLOAT32),
    ):
        adapted = attach(spec.load())
        fusion = apply_fusion(adapted, KERNELS, placement=spec.placement, checkpointing="none")
        assert fusion.enabled, fusion.choice.reasons
        found.append(gradients(adapted, dtype="float32"))
    wanted, packed = found
    assert packed.keys() == wanted.keys()
    for key, grad in packed.items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", ["gptq desc_act", "awq", "FP8"])
def test_a_merge_adds_to_the_weights_that_were_packed(tmp_path: Path, tiny_base: Path, name: str) -> None:
    weights = write_quantized(tiny_base, tmp_path / "base", FORMS[name])
    spec = prequantized(tmp_path / "base", FLOAT32)
    key = "model.layers.1.mlp.down_proj.weight"
    a, b = torch.randn(2, 128), torch.randn(64, 2)
    changes: dict[str, Change] = {key: LowRank(a=a, b=b, scaling=0.5)}
    layers = packed_base(spec)
    assert layers is not None
    source = stored(layers, base=spec.base.folder)
    built = build(spec.base.folder, changes, tmp_path / "merged", dtype=torch.float32, source=source, packed=layers)
    assert built.changed == built.adapted == 64 * 128
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == load_file(tiny_base / "model.safetensors").keys()
    torch.testing.assert_close(merged[key], weights[key] + 0.5 * b @ a, rtol=1e-6, atol=1e-6)
    unchanged = {other: weight for other, weight in weights.items() if other != key}
    assert all(torch.equal(merged[other], weight) for other, weight in unchanged.items())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    reloaded = spec.dense(tmp_path / "merged").load()
    layer: Any = reloaded.get_submodule(key.removesuffix(".weight"))
    assert torch.equal(layer.weight, merged[key])


def test_what_is_held_is_what_the_file_holds(tmp_path: Path, tiny_base: Path) -> None:
    write_quantized(tiny_base, tmp_path / "base", FORMS["gptq 4 bits"])
    loaded = prequantized(tmp_path / "base").load()
    state = load_file(tmp_path / "base" / "model.safetensors")
    kept = sum(tensor.nbytes for name, tensor in state.items() if not name.endswith("g_idx"))
    buffers = sum(buffer.nbytes for name, buffer in loaded.named_buffers() if "inv_freq" in name)
    assert resident_bytes(loaded) == kept + buffers
    assert parameter_count(loaded) == sum(t.numel() for t in load_file(tiny_base / "model.safetensors").values())


def test_an_order_that_was_never_set_says_nothing(tmp_path: Path, tiny_base: Path) -> None:
    weights = write_quantized(tiny_base, tmp_path / "base", FORMS["int4"])
    name = "model.layers.0.mlp.up_proj"
    damaged(tmp_path / "base", **{f"{name}.weight_g_idx": torch.full((64,), -1, dtype=torch.int32)})
    spec = prequantized(tmp_path / "base")
    layers = packed_base(spec)
    assert layers is not None
    wanted = weights[f"{name}.weight"].to(torch.bfloat16)
    assert torch.equal(dense(quantized_layers(spec.load())[name]), wanted)
    assert torch.equal(layers.dense(name), wanted)


@pytest.mark.parametrize(("method", "double"), [("nf4", True), ("int8", False)])
def test_a_bitsandbytes_checkpoint_is_read_as_it_was_saved(
    tmp_path: Path, tiny_base: Path, method: str, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    made = model_spec(tiny_base, quantization_config(method, double=double)).load()
    made.save_pretrained(tmp_path / "base")
    spec = prequantized(tmp_path / "base")
    loaded, layers = spec.load(), packed_base(spec)
    assert layers is not None
    for name, layer in quantized_layers(made).items():
        wanted = dense(layer, torch.bfloat16)
        assert torch.equal(dense(loaded.get_submodule(name), torch.bfloat16), wanted)
        assert torch.equal(layers.dense(name).to(torch.bfloat16), wanted)
        assert layers.shape(name) == tuple(wanted.shape)
    source = stored(layers, base=spec.base.folder)
    build(spec.base.folder, {}, tmp_path / "merged", dtype=torch.bfloat16, source=source, packed=layers)
    assert spec.dense(tmp_path / "merged").load()(input_ids=IDS).logits.isfinite().all()


def damaged(folder: Path, **changes: Any) -> None:
    """Changes tensors of a checkpoint; None removes one."""
    file = folder / "model.safetensors"
    state = {name: tensor for name, tensor in (load_file(file) | changes).items() if tensor is not None}
    save_file(state, file, metadata={"format": "pt"})


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LAYER}.scales": torch.ones(4, 128).half()}, r"has scales of shape \(4, 128\); the config describes \(2, "),
        ({f"{LAYER}.qzeros": None}, "up_proj has no qzeros"),
        ({f"{LAYER}.{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")}, "up_proj is missing"),
        ({f"{LAYER}.g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx names group 2 of 2"),
        ({f"{LAYER}.bias": torch.ones(128)}, "has a bias in the checkpoint and none in the model"),
        ({"model.layers.0.mlp.experts.0.up_proj.scales": torch.ones(2, 8)}, "holds 1 packed experts that LlamaForCau"),
    ],
    ids=["group size", "zero points", "a layer", "order", "bias", "experts"],
)
def test_tensors_that_contradict_the_config_are_refused(
    tmp_path: Path, tiny_base: Path, changes: Any, message: str
) -> None:
    write_quantized(tiny_base, tmp_path / "base", gptq(4))
    damaged(tmp_path / "base", **changes)
    with pytest.raises(ModelError, match=message):
        prequantized(tmp_path / "base").load()


def test_other_bits_than_the_config_describes_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    form = gptq(4)
    write_quantized(tiny_base, tmp_path / "base", dataclasses.replace(form, config=form.config | {"bits": 8}))
    with pytest.raises(ModelError, match=r"has qweight of shape \(16, 64\); the config describes \(32, 64\)"):
        prequantized(tmp_path / "base").load()
