"""FSDP with two processes: a base in parts computes what DDP computes with a whole one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.cli import main
from finetune.config import load
from finetune.errors import ConfigError, HardwareError
from finetune.launch import LaunchConfig, as_launched
from finetune.launch.start import accelerate_config, check_launch
from tests.fixtures.overrides import overrides
from tests.fixtures.processes import ROOT, TOLERANCE, codes, curve, train_in_turn, train_together

ODD = {"steps": 12, "tokens_per_step": 300, "dropout": 0.0, "evaluation_rows": 1}
"""3 packs a step of 10, so one process has no row in every fourth step; nor in an evaluation, which reads one row."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tokenizer: Any) -> Path:
    """Trains with DDP and FSDP: with the fused loss, where FSDP is stopped and resumed, and with TRL's own steps."""
    folder = tmp_path_factory.mktemp("runs")
    parts = {**ODD, "shards": True, "checkpointing": "full"}
    plain = {**ODD, "steps": 4, "plain": True}
    asked = [
        ("ddp", {**ODD, "layers": "plain"}),
        ("fsdp", {**parts, "stop_step": 5}),
        ("fsdp", parts),
        ("ddp-plain", plain),
        ("fsdp-plain", {**plain, "shards": True}),
    ]
    ended = train_in_turn(tiny_base, tokenizer, [(folder / name, settings) for name, settings in asked], count=2)
    assert [codes(output) for _, output in ended] == [[0, 75, 0, 0, 0]] * 2, ended
    assert "continues from step 6" in " ".join(ended[0][1].split())
    return folder


@pytest.mark.parametrize("form", ["", "-plain"])
@pytest.mark.parametrize("figure", ["train/loss", "train/grad_norm", "eval/loss"])
def test_fsdp_equals_ddp_loss_by_loss(runs: Path, form: str, figure: str) -> None:
    whole = curve(runs / f"ddp{form}", figure)
    assert len(whole) > 1
    assert curve(runs / f"fsdp{form}", figure) == pytest.approx(whole, abs=TOLERANCE)


def test_fsdp_leaves_ddps_adapter(runs: Path) -> None:
    ours, theirs = (
        load_file(runs / name / "train" / "adapter" / "adapter_model.safetensors") for name in ("fsdp", "ddp")
    )
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in theirs.items()
    }
    assert all(torch.allclose(ours[name], theirs[name], atol=TOLERANCE) for name in ours)


def test_each_process_holds_half_of_the_base(runs: Path) -> None:
    held = {
        name: [json.loads((runs / name / f"kept-{rank}.json").read_text()) for rank in range(2)]
        for name in ("ddp", "fsdp")
    }
    whole = held["ddp"][0]["base"]
    assert sum(one["base"] for one in held["fsdp"]) == whole
    assert all(one["base"] < 0.51 * whole for one in held["fsdp"])
    assert len({one["rest"] for both in held.values() for one in both}) == 1


@pytest.mark.slow
def test_shortage_of_one_process_ends_all_with_what_to_do(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    settings = {**ODD, "tokens_per_step": 880}
    ended = train_together(
        tmp_path, tiny_base, tokenizer, count=2, shards=True, short_rank=1, micro_batch=4, **settings
    )
    said = [" ".join(output.split()) for _, output in ended]
    assert [code for code, _ in ended] == [2, 2], said
    assert "and launch=fsdp cannot retry by itself. Use train.micro_batch=2" in said[1]


@pytest.mark.slow
def test_accelerates_launcher_brings_fsdp_by_its_own_file_from_data_to_merge(tmp_path: Path, tiny_base: Path) -> None:
    launched = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "scripts" / "cluster" / "accelerate_fsdp.yaml",
    ]
    done = subprocess.run(
        [
            sys.executable,
            *launched,
            "-m",
            "finetune",
            *overrides(tmp_path, tiny_base),
            "tracking=[]",
            "run.until=merge",
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layers plain: launch=fsdp gathers a layer" in said
    assert "are split into 2 shards; embedding, head and adapter are not" in said
    assert (tmp_path / "outputs" / "tiny" / "merge" / "manifest.json").is_file()


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_int8_in_shards_is_refused_up_front(strategy: str) -> None:
    with pytest.raises(
        ConfigError, match=f"method=int8 cannot be cut into shards: launch={strategy} needs quantization=nf4_double, or"
    ):
        load(["+experiment=quickstart", "quantization=int8", f"launch={strategy}"])


def test_accelerates_configuration_names_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = as_launched(LaunchConfig(strategy="single", processes=1, offload=False))
    assert (found.strategy, found.processes, found.offload) == ("fsdp", 2, True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="launch=ddp contradicts the launcher, which is configured for fsdp"):
        as_launched(LaunchConfig(strategy="ddp", processes=2, offload=False))


def test_accelerates_file_says_fsdp_and_offload() -> None:
    content = accelerate_config(LaunchConfig(strategy="fsdp", processes=2, offload=True))
    assert (content["distributed_type"], content["fsdp_config"]["fsdp_offload_params"], content["mixed_precision"]) == (
        "FSDP",
        True,
        "no",
    )


@pytest.mark.parametrize(
    ("changes", "device", "preflight", "message"),
    [
        ({}, "cuda", True, "set preflight=off"),
        ({"offload": True}, "cpu", False, "launch.offload=true moves shards"),
        ({}, "mps", False, "needs NVIDIA GPUs or CPUs"),
    ],
)
def test_what_fsdp_cannot_do_on_a_device_is_said(
    changes: dict[str, bool], device: str, preflight: bool, message: str
) -> None:
    with pytest.raises(HardwareError, match=message):
        check_launch(
            LaunchConfig(strategy="fsdp", processes=2, **{"offload": False, **changes}),
            device=device,
            preflight=preflight,
        )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_fsdp_equals_ddp_on_gpus(tmp_path: Path) -> None:
    settings = [
        "+experiment=quickstart",
        "preflight=off",
        "tracking=[]",
        "kernels.layers=plain",
        "lora.dropout=0",
        "train.steps=20",
    ]
    for strategy in ("ddp", "fsdp"):
        command = [*settings, f"launch={strategy}", f"run.root={tmp_path}", f"run.name={strategy}", "run.until=train"]
        assert main(command) == 0
    assert curve(tmp_path / "fsdp") == pytest.approx(curve(tmp_path / "ddp"), abs=0.02), (
        "4-bit codes are made in host memory and on a GPU"
    )
