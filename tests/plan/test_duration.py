"""Times from earlier runs, at best by a table, or not known."""

import json
from pathlib import Path

import pytest

from finetune.config import load
from finetune.hardware import Machine, probe
from finetune.plan import plan, show
from finetune.plan.duration import duration, training_tokens
from finetune.plan.settings import from_config
from finetune.plan.throughput import passes, table_throughput, token_operations
from tests.fixtures.architectures import COUNTS, inputs, machine

HERE = Machine(cores=2, ram_bytes=2**34, disk_free_bytes=2**40)


PARAMETERS = {name: total for name, total, *_ in COUNTS}


def finished_run(
    root: Path, *, cores: int = 2, tokens_per_second: float, model: str = "smollm2_135m", dtype: str = "bfloat16"
) -> Path:
    run = root / f"run-{cores}-{tokens_per_second:.0f}-{model}-{dtype}"
    plan = {"token_operations": 1e9, "devices": 1, "parameters": PARAMETERS[model]}
    files = {
        "train/manifest.json": {"product": {"tokens_per_second": tokens_per_second}},
        "plan/manifest.json": {"product": plan},
        "merge/manifest.json": {"seconds": tokens_per_second / 10},
        "environment.json": {"machine": {"cores": cores, "gpus": []}, "placement": {"device": "cpu", "dtype": dtype}},
    }
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))
    return run


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


def test_a_named_machine_is_at_best_as_fast_as_the_table_says() -> None:
    config = load(["+experiment=guanaco_7b", "hardware=rtx4090"])
    here = probe(config.hardware)
    found = duration(config, from_config(config, here), here, runs=None)
    assert 500 < found.tokens_per_second < 5000
    assert (found.source, found.is_measured, set(found.seconds)) == ("the maker's figures", False, {"train"})


def test_a_machine_without_earlier_runs_and_figures_has_no_time() -> None:
    config = load(["+experiment=quickstart"])
    found = duration(config, from_config(config, HERE), HERE, runs=None)
    assert (found.tokens_per_second, found.seconds, found.source) == (0, {}, "unknown until the first step")


def test_earlier_runs_of_the_same_model_in_the_same_dtype_tell_the_time(tmp_path: Path) -> None:
    finished_run(tmp_path, tokens_per_second=400)
    finished_run(tmp_path, tokens_per_second=600)
    finished_run(tmp_path, tokens_per_second=90000, cores=64)
    finished_run(tmp_path, tokens_per_second=7, model="llama2_7b")
    finished_run(tmp_path, tokens_per_second=9, dtype="float32")
    config = load(["+experiment=quickstart"])
    wanted = inputs("smollm2_135m", device="cpu")
    found = duration(config, wanted, HERE, runs=tmp_path)
    assert found.source == "2 earlier runs of this model here"
    assert found.tokens_per_second == pytest.approx(500e9 / token_operations(wanted))
    assert found.seconds["train"] > 72 * 512 / found.tokens_per_second
    assert (found.seconds["merge"], found.is_measured) == (50, True)
    assert "eval" not in found.seconds


def test_a_run_that_is_being_written_is_passed_over(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tokens_per_second=400)
    (run / "environment.json").write_text('{"machine": ')
    config = load(["+experiment=quickstart"])
    assert not duration(config, inputs("smollm2_135m", device="cpu"), HERE, runs=tmp_path).is_measured


def test_two_devices_are_twice_as_fast_apart_from_the_wire() -> None:
    alone = table_throughput(inputs(), machine(24))
    both = table_throughput(inputs(strategy="ddp", processes=2), machine(24, 24))
    sharded = table_throughput(inputs(strategy="fsdp", processes=2), machine(24, 24))
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


def test_a_time_by_the_table_is_printed_as_the_best_case(capsys: pytest.CaptureFixture[str]) -> None:
    config = load(["+experiment=guanaco_7b", "hardware=rtx4090"])
    show(plan(config, probe(config.hardware)))
    printed = " ".join(capsys.readouterr().out.split())
    assert "time: at best training " in printed
    assert "by the maker's figures" in printed
