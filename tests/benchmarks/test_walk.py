"""The walk's own parts: its arguments, the cap, and a base that is what the hub's is."""

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import walk_base, walk_memory
from benchmarks.walk import main, read_walk, stages
from benchmarks.walk_base import make_base
from benchmarks.walk_memory import Sample, run_capped
from finetune.config import load

MIB = 1024**2
ALLOCATE = "import time; held = bytearray({size}); held[::4096] = b'x' * len(held[::4096]); time.sleep({seconds})"


def test_arguments_of_the_walk_and_overrides_of_finetune_come_in_any_order() -> None:
    settings = read_walk(["lora.rank=8", "experiment=llama7b_qlora", "memory_gib=8.5", "keep=true", "run.until=train"])
    assert read_walk(["experiment=x", "model.architecture.layers=5"]).dimensions == ("model.architecture.layers=5",)
    assert read_walk(["experiment=x", "resume=kept"]).resume == Path("kept")
    assert (settings.experiment, settings.memory_gib, settings.keep) == ("llama7b_qlora", 8.5, True)
    assert settings.overrides == ("lora.rank=8", "run.until=train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory_gib=12"], "experiment=<name> is missing"),
        (["experiment=quickstart", "memory_gib=much"], "memory_gib=much cannot be read"),
        (["experiment=quickstart", "size=half"], "size must be full or tiny; got 'half'"),
        (["experiment=quickstart", "--keep"], "'--keep' is not of the form name=value"),
        (["experiment=quickstart", "keep=yes"], "keep=yes cannot be read"),
    ],
)
def test_wrong_argument_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("with_group", [True, False], ids=["cgroup where possible", "samples"])
def test_command_above_the_cap_is_ended_and_one_below_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_group: bool
) -> None:
    if not with_group:
        monkeypatch.setattr(walk_memory, "CGROUPS", ())
    for size, is_over in ((20 * MIB, False), (300 * MIB, True)):
        code = ALLOCATE.format(size=size, seconds=30 if is_over and not with_group else 0.5)
        ended = run_capped([sys.executable, "-c", code], cap_bytes=100 * MIB, environment=os.environ, folder=tmp_path)
        assert (ended.is_over, ended.code == 0) == (is_over, not is_over)
        if not is_over:
            assert size < ended.peak_anonymous_bytes <= ended.peak_rss_bytes < 100 * MIB


def test_peaks_belong_to_the_stage_that_ran(tmp_path: Path) -> None:
    lines = [{"time": 1.0, "stage": "data"}, {"time": 1.5, "stage": "data"}, {"time": 3.0, "stage": "train"}]
    (tmp_path / "memory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"seconds": 2.0}')
    samples = [Sample(0.5, 9, 90), Sample(1.2, 3, 30), Sample(2.9, 2, 40), Sample(3.1, 5, 50)]
    assert stages(tmp_path, samples) == {
        "data": {"seconds": 2.0, "peak_bytes": 40, "peak_anonymous_bytes": 3},
        "train": {"seconds": None, "peak_bytes": 50, "peak_anonymous_bytes": 5},
    }


@pytest.mark.parametrize(
    ("experiment", "model", "tokenizer", "norm"),
    [
        ("llama7b_qlora", "LlamaForCausalLM", "LlamaTokenizer", 1.0),
        ("gemma2_9b_qlora", "Gemma2ForCausalLM", "GemmaTokenizer", 0.0),
        ("qwen25_7b_qlora", "Qwen2ForCausalLM", "Qwen2Tokenizer", 1.0),
    ],
)
def test_base_is_of_its_class_and_initialised_by_it(
    experiment: str, model: str, tokenizer: str, norm: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(walk_base, "SHARD_BYTES", 2**18)
    folder = tmp_path / "base"
    count = make_base(load([f"+experiment={experiment}"]), folder, tiny=True)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert (type(loaded).__name__, type(AutoTokenizer.from_pretrained(folder)).__name__) == (model, tokenizer)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in loaded.parameters()) == count
    assert len(list(folder.glob("*.safetensors"))) > 1
    last = loaded.model.norm.weight
    assert last.min() == last.max() == norm
    assert loaded.model.layers[1].mlp.down_proj.weight.std().item() == pytest.approx(walk_base.TINY_SPREAD, rel=0.05)
