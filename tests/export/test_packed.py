"""Exports for servers: packed as they are described, opened by the project's decoder, with their cost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import ExportError
from finetune.export import ExportConfig, load
from finetune.export.fp8 import quantization_config, quantize
from finetune.export.needs import calibration_problems, check_packed
from finetune.products import Exports
from finetune.quantization import quantized_layers
from finetune.quantization.checkpoint_format import parse
from finetune.quantization.unpack import dense_weight, problem
from tests.fixtures.artifacts import Made
from tests.fixtures.exports import BOUNDS, Facts

CALIBRATION = {"group_size": 32, "calibration_rows": 8, "calibration_tokens": 32, "steps": 3}
WIDE = {"max_kl": 5.0, "max_logit_difference": 50.0}


def settings(form: str, **changes: int) -> ExportConfig:
    return ExportConfig(**{**BOUNDS, **CALIBRATION, **changes, "format": form})


def test_fp8_is_what_its_config_describes_and_rounds_each_weight_to_the_nearest() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 96, generator=generator).bfloat16()
    weight[3] = 0
    codes, scales = quantize(weight)
    stored = parse(quantization_config(), where=Path("config.json"))
    assert stored.activations
    parts = {"weight": codes, "weight_scale": scales}
    assert problem({name: tuple(part.shape) for name, part in parts.items()}, stored, shape=(64, 96)) == ""
    decoded = dense_weight(parts, stored, shape=(64, 96), dtype=torch.float32)
    assert torch.equal(decoded[3], torch.zeros(96))
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = values[values.isfinite()]
    for row in (0, 17, 63):
        possible = grid * scales[row].float()
        nearest = (weight[row].float()[:, None] - possible).abs().min(1).values
        torch.testing.assert_close((decoded[row] - weight[row].float()).abs(), nearest, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def fp8(run: Callable[..., Exports], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return run(tmp_path_factory.mktemp("run") / "export", "fp8", "card", **WIDE)


def test_fp8_export_keeps_all_but_its_layers_and_states_its_cost(fp8: Exports, merged: Facts) -> None:
    (one, _) = fp8.exports
    before = load_file(merged.folder / "model" / "model.safetensors")
    after = load_file(fp8.folder / "fp8" / "model.safetensors")
    codes = {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn}
    assert codes == {name for name in before if name.endswith("_proj.weight")}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - codes)
    assert 0 < one.parity.kl < 0.1
    assert one.parity.loss_difference.low <= one.parity.loss_difference.difference <= one.parity.loss_difference.high
    assert one.notes
    assert "rounds activations" in one.notes[0]


def test_card_has_the_command_that_serves_it(fp8: Exports) -> None:
    assert "vllm serve fp8 --served-model-name merged" in (fp8.folder / "README.md").read_text()


def test_loader_opens_packed_exports_and_refuses_changed_ones(fp8: Exports) -> None:
    model, tokenizer = load(fp8.folder / "fp8")
    assert len(quantized_layers(model)) == 14
    assert tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_calibrated_exports_are_packed_and_opened(run: Callable[..., Exports], tmp_path: Path, form: str) -> None:
    (one,) = run(tmp_path / "export", form, **CALIBRATION, **WIDE).exports
    config = json.loads((tmp_path / "export" / form / "config.json").read_text())
    assert (config["quantization_config"]["quant_method"], config["quantization_config"]["group_size"]) == (form, 32)
    assert one.parity.kl < 1
    assert one.notes
    assert "14 layers in groups of 32" in one.notes[0]
    assert "8 sequences of 32 training tokens (seed 1)" in one.notes[0]


def test_too_few_rows_are_refused_before_any_rounding(run: Callable[..., Exports], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"export.gptq: calibration takes at least 8 sequences .* at most \d+"):
        run(tmp_path / "export", "gptq", **{**CALIBRATION, "calibration_tokens": 4096})


def test_too_few_rows_are_named_before_the_training(heldout: Made) -> None:
    exports = {"good": settings("awq"), "mine": settings("awq", calibration_tokens=4096), "fp8": settings("fp8")}
    (sentence,) = calibration_problems(exports, folder=heldout.folder / "train", seed=1)
    assert sentence.startswith("export.mine: calibration takes at least 8 sequences of calibration_tokens=4096")


def test_groups_are_checked_by_config_json_alone(tiny_base: Path) -> None:
    check_packed({"good": settings("gptq", group_size=64), "fp8": settings("fp8")}, folder=tiny_base)
    with pytest.raises(
        ExportError, match=r"export.mine: group_size=128 does not divide the inputs of .*set group_size=64"
    ):
        check_packed({"mine": settings("gptq", group_size=128)}, folder=tiny_base)


def test_settings_of_calibration_are_checked() -> None:
    assert not list(settings("gptq").problems())
    sentences = " ".join(settings("gptq", group_size=48, calibration_rows=0).problems())
    assert "export.gptq.group_size must be one of 32, 64, 128; got 48" in sentences
    assert "export.gptq.calibration_rows must be at least 1; got 0" in sentences
    assert "steps" in dict(settings("awq").unused())
