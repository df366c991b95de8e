"""``quantization=gptq`` and ``awq``: a base made from the run's own rows, kept in the run and found again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.compatibility import check_groups
from finetune.errors import ModelError
from finetune.model import ModelSpec
from finetune.quantization import QuantizationConfig, quantized_layers
from finetune.quantization.checkpoint_format import read_format
from finetune.quantization.rounded import round_base
from tests.fixtures.artifacts import Line

SETTINGS = {"group_size": 32, "calibration_rows": 8, "calibration_tokens": 32, "steps": 2}


def dense(line: Callable[..., Line], **changes: int) -> ModelSpec:
    config = QuantizationConfig(**{"method": "gptq", **SETTINGS, **changes})
    return dataclasses.replace(line("none", dtype="float32").spec, quantization=config)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rounded"


def test_base_is_made_once_and_held_packed(line: Callable[..., Line], cache: Path, tmp_path: Path) -> None:
    spec, data = dense(line), line().data
    first, second = (tmp_path / name for name in ("first", "second"))
    first.mkdir()
    second.mkdir()
    made = round_base(spec, folder=first, data=data, seed=1)
    again = round_base(spec, folder=second, data=data, seed=1)
    assert (made.is_cached, again.is_cached) == (False, True)
    assert (made.sha256, made.seconds) == (again.sha256, again.seconds)
    assert (made.layers, made.sequences, made.tokens, made.seed) == (14, 8, 32, 1)
    rounded = made.apply_to(spec)
    stored = read_format(rounded.base.folder)
    assert stored is not None
    assert (stored.method, stored.bits, stored.group_size) == ("gptq", 4, 32)
    assert rounded.is_prequantized
    assert len(quantized_layers(rounded.load())) == 14
    assert rounded.load_tokenizer().chat_template
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    (entry / "model.safetensors").unlink()
    assert (first / made.name / "model.safetensors").is_file(), "the run keeps its base when the cache loses it"


def test_too_little_text_is_refused_before_rounding(line: Callable[..., Line], cache: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"quantization=gptq: calibration takes at least 8 sequences .* give more rows"
    ):
        round_base(dense(line, calibration_tokens=4096), folder=tmp_path, data=line().data, seed=1)


def test_groups_are_checked_by_config_json_alone(tiny_base: Path) -> None:
    check_groups(QuantizationConfig(method="awq", group_size=64), tiny_base)
    check_groups(QuantizationConfig(method="nf4", group_size=128), tiny_base)
    with pytest.raises(ModelError, match=r"quantization=awq: group_size=128 does not divide .* set group_size=64"):
        check_groups(QuantizationConfig(method="awq", group_size=128), tiny_base)


def test_settings_of_calibration_are_checked() -> None:
    config = QuantizationConfig(method="gptq", group_size=48, calibration_rows=0, skip_modules=["down_proj"])
    problems = " ".join(config.problems())
    assert "quantization.group_size of gptq must be one of 32, 64, 128; got 48" in problems
    assert "quantization.calibration_rows must be at least 1; got 0" in problems
    assert "quantization=gptq rounds all layers alike: leave them out" in problems
    assert {"calibration_rows", "steps"} <= dict(QuantizationConfig(method="nf4").unused()).keys()
