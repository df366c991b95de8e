"""A base moved off the grid computes the same, and the command writes its page and one line of JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.bench.int8_layers import Int8Linear
from finetune.bench.off_grid import moved_off_the_grid, rescale_layer
from finetune.bench.quantization import Lab, OptionalMeasurements
from finetune.bench.quantization_methods import EXPORTS, choose_methods
from finetune.cli import main
from finetune.errors import ConfigError, ModelError
from finetune.model import Base
from finetune.model.base import weights_sha256
from finetune.paths import CONF


def base_of(folder: Path) -> Base:
    return Base(folder=folder, name="tiny", revision=None, sha256=weights_sha256(folder), source="folder")


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=torch.tensor([[5, 60, 7, 200, 9]])).logits
    return output


def test_a_base_moved_off_the_grid_computes_the_same_with_other_weights(
    loud_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    moved = moved_off_the_grid(base_of(loud_tiny))
    assert torch.allclose(logits(moved), logits(loud_tiny), atol=1e-3)
    from safetensors.torch import load_file

    before, after = load_file(loud_tiny / "model.safetensors"), load_file(moved / "model.safetensors")
    changed = [name for name in before if "proj" in name]
    assert changed
    assert all(not torch.equal(before[name].float(), after[name]) for name in changed)
    assert moved_off_the_grid(base_of(loud_tiny)) == moved


@pytest.fixture
def loud_tiny(tiny_base: Path, tmp_path: Path) -> Path:
    """Weights large enough that a wrong scale shows in the logits."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_base, tmp_path / "loud")
    tensors = load_file(tiny_base / "model.safetensors")
    loud = {name: tensor * 8 if "proj" in name else tensor for name, tensor in tensors.items()}
    save_file(loud, tmp_path / "loud" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "loud"


def test_one_scale_left_out_would_be_seen(loud_tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = logits(loud_tiny)
    tensors = {name: tensor.float() for name, tensor in load_file(loud_tiny / "model.safetensors").items()}
    up = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    rescale_layer(tensors, "model.layers.0.", seed=1, heads=4, keys=2)
    tensors["model.layers.0.mlp.up_proj.weight"] = up
    save_file(tensors, loud_tiny / "model.safetensors", metadata={"format": "pt"})
    assert not torch.allclose(logits(loud_tiny), whole, atol=1e-3)


def test_another_architecture_is_refused(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_base, tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**settings, "model_type": "gpt2"}))
    with pytest.raises(ModelError, match="grid=as_it_is"):
        moved_off_the_grid(base_of(tmp_path / "base"))


ROWS_EACH = ("nf4_double", "int8", "awq", "fp8", "gguf_q4_0", "onnx_int8_dynamic", "w8a8_smoothquant", "qat")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough that calibration finds eight sequences, which the data stage cuts at the tiny base's positions."""
    file = tmp_path_factory.mktemp("task") / "rows.jsonl"
    rows = [{"prompt": f"say {row} " * 20, "completion": f"it is {row % 3} " * 20} for row in range(200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One problem that any program passes."""
    file = tmp_path_factory.mktemp("problems") / "HumanEval.jsonl"
    problem = {"task_id": "T/0", "prompt": "def f():\n    return 1\n", "entry_point": "f", "test": "def check(f): pass"}
    file.write_text(json.dumps(problem) + "\n")
    return file


@pytest.mark.slow
def test_the_command_writes_a_page_and_continues_where_it_stopped(
    tiny_base: Path, task: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lab" / "page.html"
    settings = [f"--model={tiny_base}", "--tokens=512", "--repeats=1", f"--out={out}"]
    settings += [f"--task={task}", "--metric=token_f1", "--rows=2", "--max-new-tokens=4"]
    settings += [f"--humaneval={problems}", "--samples=10"]
    first, all_of_them = f"--methods={ROWS_EACH[0]},{ROWS_EACH[1]}", f"--methods={','.join(ROWS_EACH)}"
    assert main(["bench", "quantization", *settings, first]) == 0
    capsys.readouterr()
    assert len(list((tmp_path / "lab" / "page").iterdir())) == 3
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "lab" / "page").glob("*8*.json")}
    assert main(["bench", "quantization", *settings, all_of_them]) == 0
    captured = capsys.readouterr()
    assert "2 of 7 methods were measured before" in captured.err + captured.out
    assert before == {file: file.stat().st_mtime_ns for file in before}, "what is kept is not measured again"
    results: list[dict[str, Any]] = json.loads(captured.out.splitlines()[-1])
    by_name = {result["backend"]: result for result in results}
    assert list(by_name) == list(ROWS_EACH)
    assert [name for name in ROWS_EACH if by_name[name]["status"] != "measured"] == ["qat"], results
    bits = {name: by_name[name]["bits_per_parameter"] for name in ROWS_EACH[:-1]}
    assert 4.1 < bits["nf4_double"] < 4.2
    assert bits["gguf_q4_0"] == 4.5
    assert all(8 < bits[name] < 9.5 for name in ("int8", "fp8", "onnx_int8_dynamic", "w8a8_smoothquant"))
    assert by_name["int8"]["kl"] < by_name["nf4_double"]["kl"]
    for name in ROWS_EACH[:-1]:
        speeds = by_name[name]["prefill_tokens_per_second"], by_name[name]["decode_tokens_per_second"]
        assert all(list(speed) == ["1", "4", "16"] and min(speed.values()) > 0 for speed in speeds), name
        assert by_name[name]["task"]["value"] >= 0
        assert (by_name[name]["humaneval"]["samples"], by_name[name]["humaneval_at_10"]["samples"]) == (1, 10)
    assert by_name["w8a8_smoothquant"]["disk_bytes"] is None
    page = out.read_text()
    assert all(text in page for text in ("Size against quality", "nf4_double", "Not measured here"))
    assert "http" not in page.replace("http-equiv", "")


def test_everything_that_changes_a_result_is_in_its_key(tiny_base: Path, tmp_path: Path) -> None:
    def key(name: str, **changes: Any) -> Path:
        rows = changes.pop("rows", [{"input_ids": [1, 2], "labels": [1, 2]}])
        optional = OptionalMeasurements(
            **{"repeats": 0, "task": None, "metric": "", "rows": 1, "max_new_tokens": 4, "humaneval": None}
            | {"problems": 1, "samples": 0, **changes}
        )
        lab = Lab(
            overrides=["+experiment=quickstart"],
            folder=tiny_base,
            half=tiny_base,
            rows=rows,
            work=tmp_path,
            kept=tmp_path,
            optional=optional,
        )
        return lab.file(name)

    assert key("nf4") == key("nf4")
    others = [key("int8"), key("nf4", repeats=1), key("nf4", max_new_tokens=5)]
    others.append(key("nf4", rows=[{"input_ids": [1, 3], "labels": [1, 3]}]))
    assert len({key("nf4"), *others}) == 5


def test_int8_layers_are_near_the_layer_and_smoothing_helps_with_an_outlier() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(64, 32, generator=generator), torch.randn(16, 32, generator=generator)
    x[:, 3] *= 100
    exact, largest = x @ weight.T, x.abs().amax(0)

    def error(layer: Int8Linear) -> float:
        return float((layer(x) - exact).norm() / exact.norm())

    dynamic = error(Int8Linear(weight, None, largest=None, smooth=False))
    static = error(Int8Linear(weight, None, largest=largest, smooth=False))
    smoothed = error(Int8Linear(weight, None, largest=largest, smooth=True))
    assert smoothed < static / 2
    assert dynamic <= static < 0.05


def test_an_unknown_method_is_refused_with_all_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"gguf_q9 is not a method; choose from awq, .*gguf_q4_0, .*w8a8_static"):
        choose_methods(["gguf_q9"])


def test_every_gguf_and_onnx_export_is_a_method() -> None:
    """The exports' names, so that a row says what `export=[...]` gives."""
    exports = {file.stem for file in (CONF / "export").glob("*.yaml")}
    assert set(EXPORTS) <= exports
    assert {name for name in exports if name.startswith("onnx")} <= set(EXPORTS)
