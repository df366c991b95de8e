"""Rough times, and where their speed comes from."""

import json
from pathlib import Path

import pytest

from finetune.config import load
from finetune.hardware import Machine, probe
from finetune.plan import plan, show
from finetune.plan.duration import stage_seconds, training_tokens
from finetune.plan.settings import from_config
from finetune.plan.throughput import passes, throughput, token_operations
from tests.fixtures.architectures import inputs, machine

HERE = Machine(cores=2, ram_bytes=2**34, disk_free_bytes=2**40)


def finished_run(root: Path, *, cores: int, tokens_per_second: float) -> None:
    run = root / f"run-{cores}-{tokens_per_second:.0f}"
    files = {
        "train/manifest.json": {"product": {"tokens_per_second": tokens_per_second}},
        "plan/manifest.json": {"product": {"token_operations": 1e9, "devices": 1}},
        "environment.json": {"machine": {"cores": cores, "gpus": []}, "placement": {"device": "cpu"}},
    }
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))


def test_a_token_costs_two_operations_for_each_weight_and_pass() -> None:
    # 6.6 billion weights that compute (the embedding is looked up, the head is passed), and 2 % for the scores of 1,024
    # tokens.
    assert token_operations(inputs(checkpointing=False)) == pytest.approx(4 * 6.6e9, rel=0.03)
    assert token_operations(inputs()) / token_operations(inputs(checkpointing=False)) == pytest.approx(1.5)


def test_only_active_experts_cost_time() -> None:
    # 12.9 billion of Mixtral's 46.7 are active: its model card.
    assert token_operations(inputs("mixtral_8x7b", checkpointing=False)) == pytest.approx(4 * 12.9e9, rel=0.06)


def test_selective_checkpointing_passes_less_than_all_again() -> None:
    config = load(["+experiment=llama7b_qlora", "train.checkpointing=selective", "hardware=rtx4090"])
    assert 2 < passes(from_config(config, probe(config.hardware))) < 3


def test_a_named_machine_is_looked_up_in_the_table() -> None:
    config = load(["+experiment=llama7b_qlora", "hardware=rtx4090"])
    found = throughput(from_config(config, probe(config.hardware)), probe(config.hardware), runs=None)
    assert "165e12 operations" in found.source
    assert 500 < found.tokens_per_second < 5000


def test_earlier_runs_on_this_machine_come_before_the_table(tmp_path: Path) -> None:
    finished_run(tmp_path, cores=2, tokens_per_second=400)
    finished_run(tmp_path, cores=2, tokens_per_second=600)
    finished_run(tmp_path, cores=64, tokens_per_second=90000)
    wanted = inputs("smollm2_135m", device="cpu")
    found = throughput(wanted, HERE, runs=tmp_path)
    assert found.source == "2 earlier runs on this machine"
    assert found.tokens_per_second == pytest.approx(500e9 / token_operations(wanted))


def test_a_run_that_is_being_written_is_passed_over(tmp_path: Path) -> None:
    finished_run(tmp_path, cores=2, tokens_per_second=400)
    (tmp_path / "run-2-400" / "environment.json").write_text('{"machine": ')
    assert "table" in throughput(inputs(device="cpu"), HERE, runs=tmp_path).source


def test_two_devices_are_twice_as_fast_apart_from_the_wire() -> None:
    alone = throughput(inputs(), machine(24), runs=None).tokens_per_second
    both = throughput(inputs(strategy="ddp", processes=2), machine(24, 24), runs=None).tokens_per_second
    sharded = throughput(inputs(strategy="fsdp", processes=2), machine(24, 24), runs=None).tokens_per_second
    assert both == pytest.approx(2 * alone)
    assert sharded < both


def test_steps_tell_how_many_tokens_there_are() -> None:
    config = load(["+experiment=guanaco_7b", "hardware=rtx4090"])
    assert training_tokens(config, from_config(config, probe(config.hardware))) == 1875 * 16 * 528


def test_a_file_tells_by_its_size_and_a_hub_only_when_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("x" * 4000)
    here = load(["+experiment=llama7b_qlora", "data=custom", f"data.path={file}", "train.epochs=3"])
    assert training_tokens(here, inputs()) == 3000
    assert training_tokens(load(["+experiment=llama7b_qlora"]), inputs()) is None


def test_every_long_stage_has_a_time() -> None:
    config = load(["+experiment=quickstart"])
    found = from_config(config, HERE)
    times = stage_seconds(config, found, throughput(found, HERE, runs=None))
    assert set(times) == {"train", "merge", "eval"}
    assert all(took > 0 for took in times.values())


def test_the_time_is_printed_and_said_to_be_rough(capsys: pytest.CaptureFixture[str]) -> None:
    config = load(["+experiment=guanaco_7b", "hardware=rtx4090"])
    show(plan(config, probe(config.hardware)))
    printed = " ".join(capsys.readouterr().out.split())
    assert "time, rough (within a factor of two): training " in printed
    assert "eval " in printed
