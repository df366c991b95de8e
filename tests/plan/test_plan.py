"""Phases, verdicts, advice and proposals."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.hardware import Gpu, Machine
from finetune.plan import phases, show
from finetune.plan.fit import propose
from finetune.plan.inputs import PlanInputs
from finetune.plan.product import Plan, make_plan
from finetune.run import plain
from tests.plan.test_architecture import architecture

GIB = 1024**3
ROOT = Path(__file__).parents[2]


def machine(*gibibytes: int, ram: int = 64) -> Machine:
    gpus = tuple(Gpu(name="a GPU", memory_bytes=size * GIB, capability="8.6") for size in gibibytes)
    return Machine(cores=8, ram_bytes=ram * GIB, disk_free_bytes=1000 * GIB, gpus=gpus)


def inputs(name: str = "llama2_7b", **changes: object) -> PlanInputs:
    start = PlanInputs(architecture=architecture(name), method="nf4", double=True, rank=16, rows=1, tokens=1024, checkpointing=True)
    return dataclasses.replace(start, **changes)  # type: ignore[arg-type]


def test_seven_billion_in_nf4_fits_eight_gibibytes_with_checkpointing() -> None:
    plan = make_plan(inputs(), machine(8), checkpoints=2)
    assert plan.fits is True
    assert plan.largest_term == "weights"


def test_without_checkpointing_it_does_not_and_the_advice_is_to_checkpoint() -> None:
    plan = make_plan(inputs(rows=2, checkpointing=False), machine(8), checkpoints=2)
    assert plan.fits is False
    assert plan.advice == "train.checkpointing=full"
    assert plan.advice_saves_bytes > 5 * GIB


def test_seventy_billion_fits_two_gpus_only_in_shards() -> None:
    alone = inputs("llama2_70b", rank=8, tokens=2048)
    sharded = dataclasses.replace(alone, strategy="fsdp", processes=2)
    offloaded = dataclasses.replace(sharded, offload=True)
    assert make_plan(alone, machine(24, 24), checkpoints=2).fits is False
    # 35.6 GB without offload at two rows, 19.6 GB with it: PEFT's FSDP guide.
    assert phases.step_peak(dataclasses.replace(sharded, rows=2)) > 24 * GIB
    assert make_plan(offloaded, machine(24, 24, ram=128), checkpoints=2).fits is True


def test_more_processes_than_gpus_do_not_fit_and_it_is_said() -> None:
    plan = make_plan(inputs(strategy="ddp", processes=4), machine(24, 24), checkpoints=2)
    assert plan.fits is False
    assert "launch.processes=4, but the machine has 2 GPUs" in plan.notes


def test_without_a_device_the_verdict_is_open() -> None:
    assert make_plan(inputs(strategy="ddp", processes=2), machine(), checkpoints=2).fits is None


def test_offloaded_shards_need_host_memory() -> None:
    wish = inputs("llama2_70b", strategy="fsdp", processes=2, offload=True, tokens=2048)
    assert make_plan(wish, machine(24, 24, ram=16), checkpoints=2).fits is False


def test_full_disk_is_said() -> None:
    small = dataclasses.replace(machine(24), disk_free_bytes=GIB)
    assert any("the disk needs" in note for note in make_plan(inputs(), small, checkpoints=2).notes)


def test_unquantized_experts_are_said_and_priced() -> None:
    plan = make_plan(inputs("mixtral_8x7b"), machine(80), checkpoints=2)
    assert plan.fits is False
    assert any("97% of the model is not quantized" in note for note in plan.notes)


def test_terms_of_a_phase_add_up_to_its_peak() -> None:
    plan = make_plan(inputs(), machine(24), checkpoints=2)
    assert sum(plan.phases[plan.peak_phase].values()) == pytest.approx(plan.peak_bytes, abs=20)


def test_plan_survives_json() -> None:
    plan = make_plan(inputs(), machine(24), checkpoints=2)
    assert Plan(**json.loads(json.dumps(plain(plan)))) == plan


def test_every_change_that_is_advised_needs_less() -> None:
    heavy = inputs(method="none", double=False, rows=4, checkpointing=False, dropout=True, upcast="all", optimizer="adamw_torch")
    plan = make_plan(heavy, machine(24), checkpoints=2)
    assert plan.advice in ("train.checkpointing=full", "train.micro_batch=2", "quantization=nf4_double")


def test_show_prints_every_phase_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    show(make_plan(inputs(), machine(24), checkpoints=2))
    printed = capsys.readouterr().out
    assert all(phase in printed for phase in ("load", "first step", "step", "save", "eval", "merge", "it fits in 24.0 GiB"))


def test_unknown_model_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(Plan(known=False, notes=["no plan: dimensions unknown"]))
    assert capsys.readouterr().out == "plan       no plan: dimensions unknown\n"


@pytest.mark.parametrize("gibibytes", [8, 12, 16, 24, 80])
def test_what_is_proposed_fits(gibibytes: int) -> None:
    sentences = propose(inputs(tokens=512), machine(gibibytes))
    assert sentences[0].startswith("proposed: train.micro_batch=")
    assert sentences[1].startswith("it needs ")


def test_a_runner_up_says_why_it_is_not_the_proposal() -> None:
    assert "slower by the closed form" in propose(inputs(tokens=512), machine(24))[-1]


def test_more_memory_is_proposed_a_faster_setting() -> None:
    assert "train.checkpointing=full" in propose(inputs(), machine(8))[0]
    assert "train.checkpointing=none" in propose(inputs(), machine(80))[0]


def test_seventy_billion_on_two_gpus_is_proposed_shards() -> None:
    sentences = propose(inputs("llama2_70b", rank=8, tokens=2048), machine(24, 24, ram=128))
    assert "launch=fsdp launch.processes=2" in sentences[0]


def test_what_cannot_fit_at_all_is_said() -> None:
    assert propose(inputs("llama31_405b"), machine(24))[0].startswith("nothing fits")


def test_micro_batch_is_never_more_than_a_step_reads() -> None:
    assert "train.micro_batch=4" in propose(inputs("smollm2_135m", step_rows=4), machine(80))[0]


def test_planning_imports_no_torch() -> None:
    code = "import sys, finetune.plan; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
