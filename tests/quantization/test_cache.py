"""The quantized copy: the very tensors of a fresh quantization, or none at all."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.hardware import Placement
from finetune.quantization import QuantizationConfig, quantized_layers
from tests.fixtures.models import model_spec

METHODS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


def load(
    folder: Path, method: str = "nf4", *, double: bool = True, dtype: str = "bfloat16", keep: tuple[str, ...] = ()
) -> Any:
    quantization = QuantizationConfig(method=method, double=double and method != "int8", skip_modules=list(keep))
    placement = Placement(
        device="cpu", dtype=dtype, attention="sdpa", optimizer="adamw_8bit", optimizer_reason="", threads=1, reasons=()
    )
    return model_spec(folder, quantization, placement=placement).load()


def tensors(loaded: Any) -> dict[str, torch.Tensor]:
    """Everything that a forward pass reads, gathered here by hand and not by the code under test."""
    found = dict(loaded.named_parameters(remove_duplicate=False)) | dict(loaded.named_buffers(remove_duplicate=False))
    for name, layer in quantized_layers(loaded).items():
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            found |= {f"{name}.SCB": layer.weight.SCB, f"{name}.CB": layer.weight.CB}
            continue
        assert layer.quant_state is state
        found |= {f"{name}.absmax": state.absmax, f"{name}.code": state.code}
        if state.nested:
            found |= {
                f"{name}.offset": state.offset,
                f"{name}.absmax2": state.state2.absmax,
                f"{name}.code2": state.state2.code,
            }
    return found


def constants(loaded: Any) -> list[Any]:
    found: list[Any] = []
    for name, layer in quantized_layers(loaded).items():
        state = getattr(layer.weight, "quant_state", None)
        found.append(
            (
                name,
                type(layer.weight),
                layer.weight.requires_grad,
                {k: v for k, v in vars(layer.weight).items() if is_plain(v)},
            )
        )
        if state is not None:
            found += [
                {k: v for k, v in vars(part).items() if is_plain(v)}
                for part in (state, state.state2)
                if part is not None
            ]
    return found


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, torch.dtype, torch.Size))


def logits(loaded: Any) -> torch.Tensor:
    with torch.no_grad():
        return loaded(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


def settings_of(loaded: Any) -> tuple[Any, Any]:
    return loaded.config.to_dict(), loaded.generation_config.to_dict()


@pytest.mark.parametrize(("method", "double"), METHODS)
def test_model_from_the_copy_is_the_fresh_one_bit_for_bit(
    tiny_base: Path, method: str, double: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = load(tiny_base, method, double=double)
    assert ") is cached in" in capsys.readouterr().out
    copied = load(tiny_base, method, double=double)
    assert "quantized base of" in " ".join(capsys.readouterr().out.split())
    before, after = tensors(fresh), tensors(copied)
    assert before.keys() == after.keys()
    assert [
        name for name in before if before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name])
    ] == []
    assert constants(fresh) == constants(copied)
    assert settings_of(fresh) == settings_of(copied)
    assert (
        (fresh.name_or_path, fresh.config._name_or_path)
        == (copied.name_or_path, copied.config._name_or_path)
        == (str(tiny_base),) * 2
    )
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert not copied.training
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert torch.equal(logits(fresh), logits(copied))


def test_layers_from_the_copy_are_protected(tiny_base: Path) -> None:
    load(tiny_base)
    layers = quantized_layers(load(tiny_base))
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())


def test_keeping_a_copy_leaves_the_model_as_it_was(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = load(tiny_base)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    alone = load(tiny_base)
    assert settings_of(kept) == settings_of(alone)
    assert all(torch.equal(one, tensors(alone)[name]) for name, one in tensors(kept).items())


def test_each_quantization_and_each_numbers_have_a_copy_of_their_own(tiny_base: Path, cache: Path) -> None:
    for count, arguments in enumerate(
        [{}, {"double": False}, {"method": "fp4"}, {"dtype": "float32"}, {"keep": ("down_proj",)}], start=1
    ):
        load(tiny_base, **arguments)  # type: ignore[arg-type]
        assert len(list(cache.glob("*4-*"))) == count
    assert len(quantized_layers(load(tiny_base, keep=("down_proj",)))) == 12


def test_unquantized_base_is_not_copied(tiny_base: Path, cache: Path) -> None:
    load(tiny_base, "none", double=False)
    assert not cache.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_changed_base_is_quantized_anew(tiny_base: Path, tmp_path: Path, cache: Path, file: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    before = load(folder)
    if file == "config.json":
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    else:
        content = bytearray((folder / file).read_bytes())
        for sign in range(-2001, 0, 2):
            content[sign] ^= 0x80
        (folder / file).write_bytes(bytes(content))
    after = load(folder)
    assert len(list(cache.glob("nf4-*"))) == 2
    assert not torch.equal(logits(before), logits(after))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    status = file.stat()
    file.write_bytes(bytes(content))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # a disk that forgets does not change the date


DAMAGES: dict[str, Any] = {
    "a bit of the weights": lambda copy: flip(copy / "model.safetensors", -100),
    "a letter of a name": lambda copy: flip(
        copy / "model.safetensors", (copy / "model.safetensors").read_bytes().index(b"mlp.up_proj")
    ),
    "the end is missing": lambda copy: os.truncate(copy / "model.safetensors", 5000),
    "the weights are missing": lambda copy: (copy / "model.safetensors").unlink(),
    "the config is not JSON": lambda copy: (copy / "config.json").write_text("{"),
    "the record is not JSON": lambda copy: (copy / "record.json").write_text("{"),
    "the record is a list": lambda copy: (copy / "record.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_copy_is_said_and_made_again(
    tiny_base: Path, cache: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = load(tiny_base)
    (copy,) = cache.glob("nf4-*")
    DAMAGES[damage](copy)
    capsys.readouterr()
    again = load(tiny_base)
    said = " ".join(capsys.readouterr().out.split())
    assert "is damaged" in said
    assert "removed, and quantized again" in said
    assert ") is cached in" in said
    assert torch.equal(logits(again), logits(fresh))
    load(tiny_base)
    assert "quantized base of" in " ".join(capsys.readouterr().out.split())


def test_cache_that_cannot_be_made_is_said_and_the_model_loads(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    assert torch.isfinite(logits(load(tiny_base))).all()
    assert "the cache of quantized bases cannot be used" in capsys.readouterr().out


def test_disk_that_is_full_while_writing_leaves_no_half_copy(
    tiny_base: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        loaded = load(tiny_base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.isfinite(logits(loaded)).all()
    assert "the quantized base is not cached" in capsys.readouterr().out
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_copies_that_nobody_reads_go_and_read_ones_stay(tiny_base: Path, cache: Path) -> None:
    load(tiny_base)
    load(tiny_base, "fp4")
    long_ago = time.time() - 31 * 86400
    for copy in cache.glob("*4-*"):
        os.utime(copy / "record.json", (long_ago, long_ago))
    (cache / ".nf4-killed.1").mkdir()
    os.utime(cache / ".nf4-killed.1", (long_ago, long_ago))
    load(tiny_base, "fp4")
    load(tiny_base, "int8")
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == [".lock", "fp4", "int8"]


def test_processes_that_start_at_once_get_the_same_model(tiny_base: Path, cache: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.quantization.test_cache import load; "
        "from finetune.quantization.cache import digest; print('digest', digest(load(Path(sys.argv[1])), threads=1))"
    )
    command = [sys.executable, "-c", program, str(tiny_base)]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)]
    answers = [process.communicate()[0].splitlines()[-1] for process in processes]
    assert answers[0] == answers[1]
    assert answers[0].startswith("digest ")
    assert len(list(cache.glob("nf4-*"))) == 1
    assert not list(cache.glob(".nf4-*"))
