"""A GPTQ and an AWQ base through the whole line: data, preflight, training, merge, evaluation and exports."""

import json
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.quantization.checkpoint_format import read_format
from tests.fixtures.overrides import overrides
from tests.fixtures.quantized_bases import FORMS, write_quantized


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq desc_act", "awq"])
def test_the_whole_line_runs_on_a_base_that_is_stored_quantized(
    tmp_path: Path, tiny_base: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_quantized(tiny_base, tmp_path / "base", FORMS[name])
    asked = [*overrides(tmp_path, tmp_path / "base"), "quantization=prequantized", "tracking=[]"]
    exports = "export=[adapter,safetensors,gguf_q8_0]"
    assert main([*asked, exports, "merge.measure_tokens=200"]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "outputs" / "tiny" / "report.json").read_text())
    assert report["status"] == "complete"
    assert report["model"]["quantization"]["method"] == "prequantized"
    assert [candidate["name"] for candidate in report["merge"]["candidates"]] == ["dequantized"]
    assert report["merge"]["candidates"][0]["kl"] < 0.01
    measured = report["eval"]["artifacts"]
    assert measured["base"]["loss"] == measured["base_quantized"]["loss"]
    assert measured["adapter"]["loss"] < measured["base"]["loss"]
    assert [export["format"] for export in report["export"]] == ["adapter", "safetensors", "gguf"]


@pytest.mark.slow
def test_the_whole_line_runs_on_a_base_that_is_calibrated_on_its_rows(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    calibration = [
        "quantization.group_size=32",
        "quantization.calibration_rows=8",
        "quantization.calibration_tokens=32",
    ]
    asked = [*overrides(tmp_path, tiny_base), "quantization=awq", *calibration, "tracking=[]", "preflight=off"]
    assert main([*asked, "export=[adapter]", "merge.measure_tokens=200"]) == 0, capsys.readouterr().err
    folder = tmp_path / "outputs" / "tiny"
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "complete"
    made = json.loads((folder / "quantization" / "manifest.json").read_text())["product"]
    assert (made["method"], made["layers"], made["sequences"], made["is_cached"]) == ("awq", 14, 8, False)
    stored = read_format(folder / "quantization" / made["name"])
    assert stored is not None
    assert (stored.method, stored.group_size) == ("awq", 32)
    assert report["eval"]["artifacts"]["adapter"]["loss"] < report["eval"]["artifacts"]["base"]["loss"]
