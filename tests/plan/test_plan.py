"""Phases, verdicts, advice and proposals."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.config import load
from finetune.errors import HardwareError
from finetune.hardware import Machine, place, probe
from finetune.jsonable import to_jsonable
from finetune.plan import phases, show, weights
from finetune.plan.activations_saved import layer_bytes
from finetune.plan.fit import propose
from finetune.plan.inputs import TRL
from finetune.plan.product import Plan, make_plan, require_fit
from finetune.plan.settings import from_config
from tests.fixtures.architectures import GIB, inputs, machine

ROOT = Path(__file__).parents[2]


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


def test_more_processes_than_gpus_do_not_fit_and_the_plan_says_so() -> None:
    plan = make_plan(inputs(strategy="ddp", processes=4), machine(24, 24), checkpoints=2)
    assert plan.fits is False
    assert plan.obstacle == "launch.processes=4, but the machine has 2 GPUs"


def test_without_a_device_the_verdict_is_open() -> None:
    assert make_plan(inputs(strategy="ddp", processes=2), machine(), checkpoints=2).fits is None


def test_offloaded_shards_need_host_memory() -> None:
    wish = inputs("llama2_70b", strategy="fsdp", processes=2, offload=True, tokens=2048)
    assert make_plan(wish, machine(24, 24, ram=16), checkpoints=2).fits is False


def test_full_disk_is_reported() -> None:
    small = dataclasses.replace(machine(24), disk_free_bytes=GIB)
    assert any("of disk space" in note for note in make_plan(inputs(), small, checkpoints=2).notes)


def test_unquantized_experts_are_reported_with_their_cost() -> None:
    plan = make_plan(inputs("mixtral_8x7b", method="int8"), machine(80), checkpoints=2)
    assert plan.fits is False
    note = next(note for note in plan.notes if "experts" in note)
    assert "97% of the model is not quantized with int8" in note
    # 45.1 billion weights in experts and routers: 2 bytes each, or 4.127 bits as NF4 with double quantization.
    assert "They take 84.0 GiB; with quantization=nf4_double they would take 21.7 GiB, 62.3 GiB less" in note


def test_experts_in_4_bits_fit_and_are_not_reported() -> None:
    plan = make_plan(inputs("qwen3_30b_a3b"), machine(24), checkpoints=2)
    assert plan.fits is True
    assert not any("experts" in note for note in plan.notes)


def test_terms_of_a_phase_add_up_to_its_peak() -> None:
    plan = make_plan(inputs(), machine(24), checkpoints=2)
    assert sum(plan.phases[plan.peak_phase].values()) == pytest.approx(plan.peak_bytes, abs=20)


def test_plan_survives_json() -> None:
    plan = make_plan(inputs(), machine(24), checkpoints=2)
    assert Plan(**json.loads(json.dumps(to_jsonable(plan)))) == plan


def test_every_change_that_is_advised_needs_less() -> None:
    heavy = inputs(
        method="none", double=False, rows=4, checkpointing=False, dropout=True, upcast="all", optimizer="adamw_torch"
    )
    plan = make_plan(heavy, machine(24), checkpoints=2)
    assert plan.advice in ("train.checkpointing=full", "train.micro_batch=2", "quantization=nf4_double")


def test_a_dense_model_that_does_not_fit_is_planned_as_it_will_run() -> None:
    """Llama 2 7B in 16 bit: offloaded on 12 GB, in small batches on 16 GB, in large ones on 24 GB; training decides."""
    setup = inputs(answers=100, answer_tokens=96, measured_rows=200)
    small, middle, large = (make_plan(setup, machine(memory), checkpoints=2) for memory in (12, 16, 24))
    assert "reads" in small.later["eval"]
    assert "the dense base is left out" in small.later["eval"]
    assert "reads" in small.later["merge"]
    for plan in (middle, large):
        assert set(plan.later) == {"eval", "merge"}
        assert not any("reads" in text for text in plan.later.values())
    for plan in (small, middle, large):
        assert plan.fits is True
        for phase in ("eval", "merge"):
            assert sum(plan.phases[phase].values()) < plan.memory_bytes
    assert small.phases["eval"]["weights"] < middle.phases["eval"]["weights"] == large.phases["eval"]["weights"]
    assert middle.phases["eval"]["cache"] < large.phases["eval"]["cache"]


def test_a_threshold_keeps_the_base_in_the_plan() -> None:
    setup = inputs(answers=100, answer_tokens=96, measured_rows=200, needs_base=True)
    assert "left out" not in make_plan(setup, machine(12), checkpoints=2).later["eval"]


def test_after_fsdp_the_dense_model_is_spread_over_the_gpus() -> None:
    setup = inputs(strategy="fsdp", processes=2, answers=100, answer_tokens=96, measured_rows=200)
    plan = make_plan(setup, machine(12, 12), checkpoints=2)
    assert "spreads the dense model over 2 GPUs" in plan.later["eval"]


def test_the_verdict_comes_first_and_the_table_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(inputs(), machine(24), checkpoints=2)
    show(plan)
    brief = capsys.readouterr().out
    assert re.match(r"plan       fits in 24\.0 GiB with 1\d\.\d GiB to spare\n", brief)
    show(plan, verbose=True)
    assert capsys.readouterr().out.startswith(brief)
    assert "first step" not in brief


def test_what_is_spare_and_what_is_needed_is_what_a_process_gets() -> None:
    plan = make_plan(inputs(), machine(24), checkpoints=2)
    assert plan.spare_bytes + plan.needed_bytes == pytest.approx(24 * GIB * phases.USABLE_SHARE, abs=2)
    short = make_plan(inputs("llama31_405b"), machine(24), checkpoints=2)
    assert short.verdict.startswith("does not fit: training needs ")
    assert short.spare_bytes < 0


def test_what_cannot_fit_is_refused_and_what_may_fit_is_not() -> None:
    with pytest.raises(HardwareError, match=r"plan: does not fit: training needs .* `finetune plan --fit` proposes"):
        require_fit(make_plan(inputs("llama2_13b"), machine(6), checkpoints=2))
    close = make_plan(inputs("llama2_13b", rank=64), machine(10), checkpoints=2)
    assert close.fits is False
    require_fit(close)
    require_fit(make_plan(inputs(), machine(), checkpoints=2))


def test_verbose_prints_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    show(make_plan(inputs(), machine(24), checkpoints=2), verbose=True)
    printed = capsys.readouterr().out
    assert all(phase in printed for phase in ("load", "first step", "step", "save", "eval", "merge"))


def test_json_is_one_document_with_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "+experiment=guanaco_7b", "hardware=rtx4090", "lora.variant=lora", "--json", "--fit"]) == 0
    found = json.loads(capsys.readouterr().out)
    fields = {field.name for field in dataclasses.fields(Plan)}
    assert fields <= found.keys()
    assert found["fits"] is True
    assert found["proposal"]


def test_unknown_model_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(Plan(known=False, notes=["no plan: dimensions unknown"]))
    assert capsys.readouterr().out == "plan       no plan: dimensions unknown\n"


@pytest.mark.parametrize("gibibytes", [8, 12, 16, 24, 80])
def test_what_is_proposed_fits(gibibytes: int) -> None:
    sentences = propose(inputs(tokens=512), machine(gibibytes))
    assert sentences[0].startswith("proposed: train.micro_batch=")
    assert sentences[1].startswith("it needs ")


def test_a_runner_up_says_why_it_is_not_the_proposal() -> None:
    runner_up = next(
        sentence for sentence in propose(inputs(tokens=512), machine(24)) if sentence.startswith("runner-up")
    )
    assert re.search(r"about \d+% slower, with .* memory", runner_up)


def test_more_memory_is_proposed_a_faster_setting() -> None:
    assert "train.checkpointing=full" in propose(inputs(), machine(8))[0]
    assert "train.checkpointing=none" in propose(inputs(), machine(80))[0]


def test_seventy_billion_on_two_gpus_is_proposed_shards() -> None:
    sentences = propose(inputs("llama2_70b", rank=8, tokens=2048), machine(24, 24, ram=128))
    assert "launch=fsdp launch.processes=2" in sentences[0]


def test_what_cannot_fit_at_all_is_reported() -> None:
    assert propose(inputs("llama31_405b"), machine(24))[0].startswith("nothing fits")


def test_micro_batch_is_never_more_than_a_step_reads() -> None:
    assert "train.micro_batch=4" in propose(inputs("smollm2_135m", step_rows=4), machine(80))[0]


NAMED = ["rtx4060_8gb", "rtx3060_12gb", "rtx4060ti_16gb", "rtx4090", "t4", "a100_80gb", "2xrtx3090", "cpu_64gb"]


@pytest.mark.parametrize("name", NAMED)
def test_a_proposal_that_is_pasted_fits(name: str) -> None:
    """What is printed as overrides is what was planned, whoever types it."""
    overrides = ["+experiment=llama7b_qlora", f"hardware={name}"]
    config = load(overrides)
    here = probe(config.hardware)
    words = propose(from_config(config, here), here)[0].removeprefix("proposed: ").split()
    pasted = load([*overrides, *words])
    assert make_plan(from_config(pasted, here), here, checkpoints=2).fits is True


def test_a_pair_is_planned_as_two_documents_of_the_longest_row() -> None:
    config = load(["+experiment=dpo_quick"])
    found = from_config(config, probe(config.hardware))
    assert (found.documents, found.tokens, found.step_tokens) == (2, 512, 2 * 2 * 512)


def test_a_gpu_without_bfloat16_gets_plain_layers() -> None:
    overrides = ["+experiment=llama7b_qlora", "lora.dropout=0"]
    for name, fused in (("rtx4090", True), ("t4", False)):
        config = load([*overrides, f"hardware={name}"])
        assert from_config(config, probe(config.hardware)).kernels.fused is fused


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["kernels.layers=fused", "lora=dora"],
            "kernels.layers=fused is not possible here: only peft computes lora.variant=dora",
        ),
        (["kernels.implementation=native", "model.dtype=float32"], "they compute in bfloat16 and this run in float32"),
    ],
)
def test_a_plan_refuses_the_kernels_that_the_run_would_refuse(overrides: list[str], reason: str) -> None:
    config = load(["+experiment=quickstart", "hardware.device=cpu", *overrides])
    with pytest.raises(HardwareError, match=reason):
        from_config(config, probe(config.hardware))


def test_a_plan_has_the_dtype_that_the_run_is_placed_in() -> None:
    cpu = Machine(cores=2, ram_bytes=16 * GIB, disk_free_bytes=100 * GIB, processor="x86_64")
    with_bfloat16 = dataclasses.replace(cpu, features=("avx512_bf16",))
    for here, dtype, element in ((cpu, "auto", 4), (with_bfloat16, "auto", 2), (cpu, "bfloat16", 2)):
        config = load(["+experiment=quickstart", f"model.dtype={dtype}"])
        planned = from_config(config, here)
        assert (planned.compute_bytes, planned.stored_bytes) == (element, element)
        assert planned.kernels.native is (element == 2)
        assert {2: "bfloat16", 4: "float32"}[element] == place(here, config).dtype


def test_offloaded_activations_wait_in_the_host() -> None:
    here = inputs(rows=4)
    away = dataclasses.replace(here, offload_activations=True)
    moved = 32 * 4 * 1024 * 4096 * 2
    assert phases.step_peak(here) - phases.step_peak(away) == pytest.approx(moved, rel=0.1)
    assert phases.host_bytes(away)["step"] - phases.host_bytes(here)["step"] == moved


def test_a_heap_has_half_as_many_holes_as_blocks() -> None:
    cpu = inputs("smollm2_135m", device="cpu", checkpointing=False)
    assert phases.device_phases(cpu)["step"]["allocator"] == pytest.approx(15 * layer_bytes(cpu))


def test_zero3_shards_as_everyone_elses_fsdp_does() -> None:
    sharded = inputs("llama2_70b", strategy="fsdp", processes=2, trainer=dataclasses.replace(TRL, cuts_all=True))
    assert phases.step_peak(dataclasses.replace(sharded, strategy="zero3")) == phases.step_peak(sharded)


def test_zero3_loads_a_whole_quantized_base_on_each_device_and_fsdp_in_host_memory() -> None:
    sharded = inputs("llama2_70b", strategy="fsdp", processes=8)
    zero = dataclasses.replace(sharded, strategy="zero3")
    whole = weights.weight_bytes(sharded).total
    loads = {setup.strategy: phases.total(phases.device_phases(setup)["load"]) for setup in (sharded, zero)}
    assert loads["zero3"] > whole
    assert loads["fsdp"] < whole / 4
    assert phases.host_bytes(sharded)["load"] > 8 * whole > phases.host_bytes(zero)["load"]
    dense = dataclasses.replace(zero, method="none")
    assert phases.total(phases.device_phases(dense)["load"]) < weights.weight_bytes(dense).total / 4


def test_our_fsdp_cuts_the_layers_alone() -> None:
    ours = inputs("llama2_70b", strategy="fsdp", processes=2)
    theirs = dataclasses.replace(ours, trainer=dataclasses.replace(TRL, cuts_all=True))
    found, other = (phases.device_phases(setup)["step"] for setup in (ours, theirs))
    assert found["adapter"] == weights.adapter_bytes(ours) == 2 * other["adapter"]
    assert found["unquantized"] > weights.weight_bytes(ours).ends > other["unquantized"]
    assert found["gathered"] < other["gathered"]


def test_deepspeed_is_planned_as_zero3() -> None:
    config = load(["+experiment=llama7b_qlora", "launch=deepspeed"])
    assert from_config(config, machine(24, 24)).strategy == "zero3"


def test_planning_imports_no_torch() -> None:
    code = "import sys, finetune.plan; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
