"""A GPTQ and an AWQ base through the whole line: data, preflight, training, merge, evaluation and exports."""

import json
from pathlib import Path

import pytest

from finetune.cli import main
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
