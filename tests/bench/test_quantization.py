"""A base moved off the grid computes the same, and the command writes its page and one line of JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.bench.off_grid import moved_off_the_grid, rescale_layer
from finetune.cli import main
from finetune.errors import ModelError
from finetune.model import Base
from finetune.model.base import weights_sha256


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


@pytest.mark.slow
def test_the_command_writes_a_page_and_one_line_of_json(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    settings = [f"--model={tiny_base}", "--tokens=512", "--repeats=1", "--backends=nf4_double,int8,awq", f"--out={out}"]
    assert main(["bench", "quantization", *settings]) == 0
    results: list[dict[str, Any]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {result["backend"]: result for result in results}
    assert 4.1 < by_name["nf4_double"]["bits_per_parameter"] < by_name["int8"]["bits_per_parameter"] < 9
    assert by_name["int8"]["kl"] < by_name["nf4_double"]["kl"]
    assert by_name["awq"]["status"].startswith("not run: it is calibrated on the training rows of a run")
    page = out.read_text()
    assert all(text in page for text in ("Size against quality", "nf4_double", "Not measured here"))
    assert "http" not in page.replace("http-equiv", "")
