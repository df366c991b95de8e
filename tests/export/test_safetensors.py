"""Merged weights in another dtype and other files are the same model, or the export says what it cannot hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError
from finetune.export import load
from finetune.products import Exports
from tests.fixtures.exports import Facts

Run = Callable[..., Exports]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_dtype_is_written_and_its_cost_reported(run: Run, merged: Facts, tmp_path: Path, dtype: str) -> None:
    (one,) = run(tmp_path / "export", "safetensors", dtype=dtype).exports
    folder = tmp_path / "export" / "safetensors"
    old, new = (load_file(place / "model.safetensors") for place in (merged.folder / "model", folder))
    assert {tensor.dtype for tensor in new.values()} == {getattr(torch, dtype)}
    assert all(torch.allclose(new[name].float(), tensor.float(), atol=1e-7) for name, tensor in old.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert one.parity.max_logit_difference < 1e-3
    assert one.parity.cost.kl < 1e-2
    assert next(load(folder)[0].parameters()).dtype == getattr(torch, dtype)


def test_files_are_no_larger_than_asked(run: Run, merged: Facts, tmp_path: Path) -> None:
    run(tmp_path / "export", "safetensors", shard_bytes=80_000)
    folder = tmp_path / "export" / "safetensors"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 90_000 for file in files)
    one, many = (
        AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (merged.folder / "model", folder)
    )
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_without_wishes_the_weights_are_not_written_again(run: Run, merged: Facts, tmp_path: Path) -> None:
    run(tmp_path / "export", "safetensors")
    assert (tmp_path / "export" / "safetensors" / "model.safetensors").samefile(
        merged.folder / "model" / "model.safetensors"
    )


def large(merged: Facts, folder: Path, **factors: float) -> Facts:
    """The merged model with some weights multiplied; the first of each that is named gets beyond float16."""
    shutil.copytree(merged.folder, folder)
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    for part, factor in factors.items():
        tensors = {name: tensor * factor if part in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return Facts(folder=folder)


def test_weight_beyond_float16_is_named(run: Run, merged: Facts, tmp_path: Path) -> None:
    other = large(merged, tmp_path / "large", up_proj=1e7)
    with pytest.raises(
        ExportError, match=r"dtype=float16: model.layers.0.mlp.up_proj.weight holds weights beyond its range"
    ):
        run(tmp_path / "export", "safetensors", from_merged=other, dtype="float16")
    assert not (tmp_path / "export" / "safetensors").exists()


def test_activations_beyond_float16_are_reported(run: Run, merged: Facts, tmp_path: Path) -> None:
    other = large(merged, tmp_path / "large", up_proj=2e3, down_proj=2e3)
    with pytest.raises(ExportError, match=r"activations of this model overflow float16"):
        run(tmp_path / "export", "safetensors", from_merged=other, dtype="float16")


@pytest.mark.parametrize("format", ["safetensors", "bitsandbytes", "onnx", "adapter"])
def test_full_disk_is_reported_before_anything_is_written(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
) -> None:
    (tmp_path / "export" / format).mkdir(parents=True)
    (tmp_path / "export" / format / "good").write_text("an earlier export")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(ExportError, match=rf"export.{format} needs .* of disk space in .* and 1000 B are free"):
        run(tmp_path / "export", format)
    assert (tmp_path / "export" / format / "good").is_file()
    assert not list((tmp_path / "export" / ".work").iterdir())
