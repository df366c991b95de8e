"""Dequantized candidates are written layer by layer from disk, and equal those of the model in memory to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.inference.adapted import load_adapted_model
from finetune.merge.adapter_deltas import read_changes
from finetune.merge.candidates import build
from finetune.merge.graph import dequantized
from tests.fixtures.artifacts import Line, Made
from tests.fixtures.graphs import weights_of

FILE = "model.safetensors"


def check_equal(line: Line, adapter: Made, work: Path) -> None:
    folder, base = adapter.folder / "adapter", line.spec.base.folder
    graph, changes = load_adapted_model(line.spec, folder), read_changes(folder)
    in_memory = build(base, changes, work / "memory", dtype=torch.float32, source=weights_of(graph))
    source = dequantized(line.spec, graph, work=work)
    del graph
    streamed = build(base, changes, work / "disk", dtype=torch.float32, source=source)
    assert (streamed.folder / FILE).read_bytes() == (in_memory.folder / FILE).read_bytes()
    assert streamed.changed == in_memory.changed > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "torchao_int8", "hqq"])
def test_layers_from_the_cached_copy_are_those_of_the_model(
    line: Callable[..., Line],
    adapter: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    dtype: str,
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    check_equal(line(method, dtype=dtype), adapter, tmp_path)
    assert list((tmp_path / "cache" / "quantized").glob(f"{method}-*"))
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("method", ["nf4", "hqq"])
def test_without_a_cache_the_layers_are_saved_for_the_merge(
    line: Callable[..., Line], adapter: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    check_equal(line(method), adapter, tmp_path)
    assert (tmp_path / "quantized").is_dir()
