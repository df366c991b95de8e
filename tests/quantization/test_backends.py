"""Every library that is offered: loaded, tuned, saved, opened again and merged, on a CPU."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune import lora, model
from finetune.errors import ModelError
from finetune.hardware.backends import BACKENDS
from finetune.inference.adapted import load_adapted_model, load_adapter
from finetune.inference.kl_divergence import compare_with_reference, record_reference
from finetune.inference.rows import read_rows
from finetune.kernels import apply_fusion
from finetune.lora import LoraConfig
from finetune.merge.adapter_deltas import read_changes
from finetune.merge.candidates import build
from finetune.quantization import QuantizationConfig, quantized_layers, spec
from finetune.quantization.backends import backend_of, dense, packed_weight
from tests.fixtures.graphs import weights_of
from tests.fixtures.models import PLACEMENT, model_spec
from tests.fixtures.preflight import KERNELS, Scene

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
SETTINGS = [
    QuantizationConfig(method="torchao_int8"),
    QuantizationConfig(method="hqq"),
    QuantizationConfig(method="hqq", bits=8, group_size=32),
    QuantizationConfig(method="hqq", bits=3),
    QuantizationConfig(method="hqq", bits=1, group_size=8),
]
NAMES = ["torchao_int8", "hqq", "hqq 8", "hqq 3", "hqq 1"]
backends = pytest.mark.parametrize("config", SETTINGS, ids=NAMES)
each_library = pytest.mark.parametrize("config", SETTINGS[:2], ids=NAMES[:2])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


def settings(folder: Path) -> Any:
    return model.ModelConfig(
        name=str(folder),
        revision=None,
        dtype="auto",
        attention="auto",
        upcast="none",
        remote_code={},
        architecture=None,
    )


def load(folder: Path, config: QuantizationConfig) -> Any:
    return model_spec(folder, config).load()


def attach(loaded: Any) -> Any:
    wished = LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=["all-linear"], dtype="float32")
    return lora.attach(loaded, wished, upcast="none", checkpointing=False, seed=1)


def gradients(adapted: Any) -> dict[str, torch.Tensor]:
    adapted.train()
    adapted.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}


@backends
def test_weights_are_packed_and_near_the_base_s(tiny_base: Path, config: QuantizationConfig) -> None:
    loaded = load(tiny_base, config)
    layers = quantized_layers(loaded)
    assert len(layers) == 14, "two blocks of seven linear layers"
    weights = load_file(tiny_base / "model.safetensors")
    bits = 8 if config.method == "torchao_int8" else config.bits
    for name, layer in layers.items():
        original = weights[f"{name}.weight"].float()
        assert packed_weight(layer).shape == original.shape
        assert (
            packed_weight(layer).codes.nbytes
            <= math.ceil(original.numel() * max(bits, 3.2 if bits == 3 else 1) / 8) + 4 * original.shape[1]
        )
        error = (dense(layer, torch.float32) - original).norm() / original.norm()
        assert error < 3 / 2**bits, f"{name} is off by {error:.3f}"


@backends
def test_it_generates(tiny_base: Path, config: QuantizationConfig) -> None:
    written = load(tiny_base, config).generate(
        input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert written.shape == (1, IDS.shape[1] + 4)


@backends
def test_the_copy_holds_the_very_tensors(tiny_base: Path, config: QuantizationConfig, cache: Path, capsys: Any) -> None:
    first = load(tiny_base, config)(input_ids=IDS).logits
    again = load(tiny_base, config)(input_ids=IDS).logits
    assert "quantized base of" in " ".join(capsys.readouterr().out.split())
    assert torch.equal(first, again)
    assert [path.name.partition("-")[0] for path in cache.iterdir() if path.is_dir()] == [config.method]


@each_library
def test_a_copy_with_another_number_is_made_again(
    tiny_base: Path, config: QuantizationConfig, cache: Path, capsys: Any
) -> None:
    load(tiny_base, config)
    (file,) = cache.glob("*/*.safetensors")
    tensors = load_file(file)
    largest = max((name for name in tensors if "embed" not in name), key=lambda name: tensors[name].nbytes)
    tensors[largest].view(torch.uint8)[0, 0] ^= 1
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata=metadata)
    capsys.readouterr()
    load(tiny_base, config)
    assert "is damaged" in capsys.readouterr().out


@each_library
def test_tuning_learns_through_every_layer_and_changes_no_frozen_weight(
    tiny_base: Path, config: QuantizationConfig
) -> None:
    adapted = attach(load(tiny_base, config))
    before = {
        name: (packed_weight(one).codes.clone(), dense(one).clone()) for name, one in quantized_layers(adapted).items()
    }
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 14
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(3):
        found = gradients(adapted)
        with torch.no_grad():
            losses.append(float(adapted(input_ids=IDS, labels=IDS).loss))
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(found[name].any() for name in found), "after the first step B is not zero, so every A has a gradient"
    assert len(found) == 2 * 14
    for name, layer in quantized_layers(adapted).items():
        assert torch.equal(packed_weight(layer).codes, before[name][0])
        assert torch.equal(dense(layer), before[name][1])


@backends
def test_gradients_are_those_of_the_dequantized_model(tiny_base: Path, config: QuantizationConfig) -> None:
    """Truncated gradients would show here: some kernels compute the forward pass only."""
    adapted = attach(load(tiny_base, config))
    plain = attach(load(tiny_base, QuantizationConfig(method="none")))
    twins = dict(plain.named_modules())
    for name, layer in quantized_layers(adapted).items():
        twins[name].weight.data = dense(layer, torch.bfloat16)
    for one in (adapted, plain):
        torch.manual_seed(2)
        for name, parameter in one.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape) * 0.02
    found, wanted = gradients(adapted), gradients(plain)
    assert found.keys() == wanted.keys()
    apart = math.sqrt(sum(float((found[name] - wanted[name]).square().sum()) for name in wanted))
    assert apart < 0.02 * math.sqrt(sum(float(grad.square().sum()) for grad in wanted.values()))


@backends
def test_an_evaluation_in_between_leaves_gradients_as_they_are(tiny_base: Path, config: QuantizationConfig) -> None:
    adapted = attach(load(tiny_base, config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    before = gradients(adapted)
    adapted.eval()
    with torch.no_grad():
        adapted(input_ids=IDS)
        adapted.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    after = gradients(adapted)
    assert all(torch.equal(before[name], after[name]) for name in before)


@each_library
def test_a_saved_adapter_on_a_fresh_base_gives_the_same_logits(
    tiny_base: Path, config: QuantizationConfig, tmp_path: Path
) -> None:
    adapted = attach(load(tiny_base, config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) * 0.05
    adapted.eval().save_pretrained(tmp_path / "adapter")
    fresh = load_adapter(load(tiny_base, config), tmp_path / "adapter", upcast="none")
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=IDS).logits, fresh(input_ids=IDS).logits)


@each_library
def test_the_merge_is_the_trained_graph_and_peft_s_own_is_not(
    line: Any, adapter: Any, tmp_path: Path, config: QuantizationConfig
) -> None:
    from transformers import AutoModelForCausalLM

    parts = line("none", dtype="float32")
    rows, folder = read_rows(parts.data.folder / "heldout"), adapter.folder / "adapter"
    graph = load_adapted_model(dataclasses.replace(parts.spec, quantization=config), folder)
    reference = record_reference(graph, rows, tmp_path / "reference.f32", batch_tokens=512)
    build(
        parts.spec.base.folder,
        read_changes(folder),
        tmp_path / "merged",
        dtype=torch.float32,
        source=weights_of(graph),
    )
    ours = compare_with_reference(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), rows, reference, batch_tokens=512
    )
    assert ours.kl < 1e-6
    rounded_again = compare_with_reference(graph.merge_and_unload(), rows, reference, batch_tokens=512)
    assert rounded_again.kl > 20 * max(ours.kl, 1e-7)


@each_library
def test_the_checks_of_the_preflight_pass(
    scene: Scene,
    tiny_base: Path,
    config: QuantizationConfig,
) -> None:
    scene.trainable.model = attach(load(tiny_base, config))
    scene.trainable.spec = model_spec(tiny_base, config)
    scene.trainable.fusion = apply_fusion(scene.trainable.model, KERNELS, placement=PLACEMENT, checkpointing="none")
    assert not scene.trainable.fusion.choice.fused, "its layers compute in their own way"
    checks = {check.name: check for check in scene.run_preflight().checks}
    assert checks["evaluation"].passed, checks["evaluation"]
    assert all(check.passed for check in checks.values()), checks


def test_groups_that_do_not_divide_a_layer_are_refused(tiny_base: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"quantization.group_size=56 does not divide the weights of down_proj, .*; choose one that does",
    ):
        load(tiny_base, QuantizationConfig(method="hqq", group_size=56))


@each_library
def test_layers_are_kept_by_segment_and_by_full_name(tiny_base: Path, config: QuantizationConfig) -> None:
    loaded = load(tiny_base, dataclasses.replace(config, skip_modules=["down_proj", "model.layers.1.self_attn.*"]))
    assert len(quantized_layers(loaded)) == 14 - 2 - 4
    assert backend_of(loaded.model.layers[0].self_attn.q_proj) is not None
    assert backend_of(loaded.model.layers[1].self_attn.q_proj) is None


def test_each_runnable_method_that_is_called_tunable_is_tried_in_this_package() -> None:
    tried = {
        "none",
        "nf4",
        "fp4",
        "int8",
        "prequantized",
        "gptq",
        "awq",
        "qat",
        *[config.method for config in SETTINGS],
    }
    assert (
        {name for name, backend in BACKENDS.items() if backend.tunable}
        == {name for name, backend in BACKENDS.items() if backend.devices}
        == tried
    )


def test_what_a_loader_must_know_travels() -> None:
    assert spec(SETTINGS[2]) == {"method": "hqq", "bits": 8, "group_size": 32, "keep": []}
    assert spec(SETTINGS[0]) == {"method": "torchao_int8", "keep": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "hqq", "bits": 7}, "quantization.bits must be one of 1, 2, 3, 4, 5, 6, 8; got 7"),
        ({"method": "hqq", "group_size": 12}, "quantization.group_size must be a multiple of 8; got 12"),
        ({"method": "none", "skip_modules": ["down_proj"]}, "quantization=none quantizes nothing: leave them out"),
        ({"method": "nf4", "skip_modules_mib": -1.0}, "quantization.skip_modules_mib must not be negative; got -1.0"),
    ],
)
def test_impossible_settings_say_the_rule(changes: dict[str, Any], message: str) -> None:
    (problem,) = QuantizationConfig(**changes).problems()
    assert message in problem
