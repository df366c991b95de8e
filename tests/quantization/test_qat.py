"""``quantization=qat``: the trained model is the rounding of base plus adapter, and an export rounds the same."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from transformers import AutoModelForCausalLM

from finetune import lora
from finetune.checks import check_merge_dtype
from finetune.cli import main
from finetune.compatibility import check_groups
from finetune.config import load
from finetune.errors import ConfigError, ModelError
from finetune.inference.adapted import load_adapted_model
from finetune.lora import LoraConfig
from finetune.merge.adapter_deltas import as_trained, read_changes
from finetune.merge.candidates import build
from finetune.model import ModelSpec
from finetune.quantization import QuantizationConfig, loader_arguments, quantized_layers
from finetune.quantization.backends import dense, packed_weight
from finetune.quantization.bnb import prevent_repacking
from finetune.quantization.qat import RoundedLinear, round_nf4, round_sums
from tests.fixtures.mixtures import write_mixture
from tests.fixtures.models import PLACEMENT, model_spec
from tests.fixtures.overrides import overrides

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def spec_of(folder: Path, *, dtype: str = "float32", double: bool = True, skipped: tuple[str, ...] = ()) -> ModelSpec:
    config = QuantizationConfig(method="qat", double=double, skip_modules=list(skipped))
    return model_spec(folder, config, placement=dataclasses.replace(PLACEMENT, dtype=dtype))


def adapted(spec: ModelSpec, *, variant: str = "lora", targets: tuple[str, ...] = ("all-linear",)) -> Any:
    wished = LoraConfig(variant=variant, rank=4, alpha=8.0, dropout=0.0, targets=list(targets), dtype="float32")
    documents = [[number % 50 for number in range(64)]]
    return lora.attach(spec.load(), wished, upcast="none", checkpointing=False, seed=1, calibration=documents)


def train(model: Any, optimizer: Any, *, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@dtypes
@pytest.mark.parametrize("double", [False, True], ids=["float constants", "double"])
def test_rounding_the_merged_model_gives_the_weights_that_were_trained(
    tiny_base: Path, tmp_path: Path, dtype: str, double: bool
) -> None:
    spec = spec_of(tiny_base, dtype=dtype, double=double)
    model = adapted(spec)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    written = getattr(torch, dtype)
    changes = as_trained(read_changes(tmp_path / "adapter"), spec, dtype=written)
    build(tiny_base, changes, tmp_path / "merged", dtype=written)
    config = QuantizationConfig(method="nf4", double=double)
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=written, **loader_arguments(config, dtype=dtype)
    )
    prevent_repacking(exported)
    layers = quantized_layers(exported)
    assert len(layers) == 14
    for name, layer in layers.items():
        _, codes, constants = model.base_model.model.get_submodule(name).get_base_layer().rounded
        packed = packed_weight(layer)
        assert torch.equal(codes, packed.codes)
        assert torch.equal(constants.absmax, packed.constants["absmax"])
    assert torch.equal(logits(exported), trained)
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=written)), trained)


@dtypes
@pytest.mark.parametrize("double", [False, True], ids=["float constants", "double"])
def test_rounding_is_that_of_bitsandbytes_to_the_bit(dtype: str, double: bool) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(192, 256) * torch.logspace(-6, 3, 192)[:, None]).to(getattr(torch, dtype))
    weight[0] = 0
    weight[1, ::2] = weight[1, 0]
    codes, state = round_nf4(weight, double=double)
    wanted, constants = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    assert torch.equal(codes, wanted)
    ours, theirs = (part.as_dict(packed=True) for part in (state, constants))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@dtypes
def test_a_saved_adapter_gives_the_trained_model_again(tiny_base: Path, tmp_path: Path, dtype: str) -> None:
    spec = spec_of(tiny_base, dtype=dtype)
    model = adapted(spec)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_adapted_model(spec, tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("variant", ["lora", "rslora", "olora", "pissa", "eva"])
def test_every_variant_starts_as_the_rounded_base(tiny_base: Path, variant: str) -> None:
    model = adapted(spec_of(tiny_base), variant=variant)
    with model.disable_adapter():
        base = logits(model)
    difference = (logits(model) - base).abs().max()
    assert difference <= (0 if variant in ("lora", "rslora", "eva") else 1e-2)


def test_gradients_pass_the_rounding_as_if_it_were_the_identity(tiny_base: Path) -> None:
    model = adapted(spec_of(tiny_base))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    torch.nn.init.normal_(b, std=0.02)
    x = torch.randn(6, layer.in_features, requires_grad=True)
    layer(x).square().sum().backward()
    ours = [tensor.grad.clone() for tensor in (x, a, b)]
    x.grad = a.grad = b.grad = None
    total = layer.get_base_layer().weight + scale * b @ a
    rounded = dense(model_with(layer, total))
    (x @ (total + (rounded - total).detach()).T).square().sum().backward()
    for gradient, expected in zip(ours, (x.grad, a.grad, b.grad), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def model_with(layer: Any, weight: torch.Tensor) -> RoundedLinear:
    """Returns a rounded layer without an adapter whose weight is the sum."""
    alone = RoundedLinear(layer.in_features, layer.out_features, bias=False)
    alone.weight.data, alone.rounds_constants = weight.detach(), layer.get_base_layer().rounds_constants
    return alone


def test_steps_that_torch_does_not_count_are_seen(tiny_base: Path, tmp_path: Path) -> None:
    import bitsandbytes

    spec = spec_of(tiny_base)
    model = adapted(spec)
    before = logits(model)
    train(model, bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-2), steps=1)
    model.save_pretrained(tmp_path / "adapter")
    after = logits(model)
    assert not torch.equal(after, before)
    assert torch.equal(logits(load_adapted_model(spec, tmp_path / "adapter")), after)


def test_the_layers_are_those_that_an_export_rounds(tiny_base: Path) -> None:
    skipped = ("down_proj", "model.layers.0.*")
    config = QuantizationConfig(method="nf4", skip_modules=list(skipped))
    exported = quantized_layers(model_spec(tiny_base, config).load())
    base = spec_of(tiny_base, skipped=skipped).load()
    assert quantized_layers(base).keys() == exported.keys()
    assert {type(layer) for layer in quantized_layers(base).values()} == {RoundedLinear}
    model = adapted(spec_of(tiny_base), targets=("q_proj",))
    assert len(quantized_layers(model)) == 14, "a layer without an adapter is rounded too"


def test_layers_that_blocks_do_not_divide_are_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.quantization import qat

    monkeypatch.setattr(qat, "BLOCK", 128)
    with pytest.raises(ModelError, match=r"inputs of .*q_proj.* are not a multiple of 128, .*skip_modules=\[.*q_proj"):
        spec_of(tiny_base).load()


def test_a_model_without_rounded_layers_stays_as_it_is(tiny_base: Path) -> None:
    model = adapted(dataclasses.replace(spec_of(tiny_base), quantization=QuantizationConfig(method="none")))
    forwards = [dict(vars(module)).get("forward") for module in model.modules()]
    round_sums(model)
    assert [dict(vars(module)).get("forward") for module in model.modules()] == forwards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lora.dropout=0.1"], "lora.dropout drops inputs .* got 0.1: set lora.dropout=0"),
        (["lora.variant=dora"], "got quantization.method=qat: choose quantization=nf4"),
        (["lora.variant=loftq"], "got quantization.method=qat: choose quantization=nf4"),
        (["lora.experts=shared"], "needs experts in 4 bits; got quantization.method=qat"),
        (["model.upcast=all"], "model.upcast=all changes the weights .* set model.upcast=norms or none"),
        (["merge.choose=dequantized"], "keeps its base dense; use heldout_loss or original"),
        (["quantization.skip_modules_mib=4"], "name layers in quantization.skip_modules"),
        (["launch=fsdp"], "quantization.method=qat cannot be cut into shards"),
    ],
)
def test_what_a_rounded_sum_cannot_express_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(["+experiment=quickstart", "quantization=qat", *changes])


def test_a_merge_that_would_round_another_sum_is_refused() -> None:
    config = load(["+experiment=quickstart", "quantization=qat"])
    check_merge_dtype(config, dtype="bfloat16")
    with pytest.raises(ConfigError, match=re.escape("merge.dtype=bfloat16: ") + ".* set merge.dtype=float32"):
        check_merge_dtype(config, dtype="float32")


def test_a_mixture_is_refused_by_its_config_json(tmp_path: Path) -> None:
    write_mixture(tmp_path, "mixtral")
    with pytest.raises(ModelError, match="quantization=qat: experts are stacked weights"):
        check_groups(QuantizationConfig(method="qat"), tmp_path)


@pytest.mark.slow
def test_the_whole_line_ends_in_a_4_bit_export_that_is_the_trained_model(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*overrides(tmp_path, tiny_base), "quantization=qat", "tracking=[]", "merge.measure_tokens=200"]
    assert main([*asked, "model.dtype=bfloat16", "export=[adapter,bitsandbytes,card]"]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "outputs" / "tiny" / "report.json").read_text())
    assert report["status"] == "complete"
    assert report["model"]["quantization"] == {"method": "qat", "double": True, "blocksize": 64, "keep": []}
    assert [candidate["name"] for candidate in report["merge"]["candidates"]] == ["original"]
    adapter, exported, _ = report["export"]
    trained, merged = (report["eval"]["artifacts"][name] for name in ("adapter", "merged"))
    assert adapter["parity"]["model_loss"] == pytest.approx(merged["loss"], abs=1e-3)
    assert exported["format"] == "bitsandbytes"
    assert exported["parity"]["model_loss"] == trained["loss"]
