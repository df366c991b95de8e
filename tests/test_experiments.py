"""Every shipped experiment composes, passes its checks and can be planned; every option of every group composes."""

import dataclasses

import pytest

from finetune.config import load
from finetune.hardware import Machine
from finetune.hardware.backends import BACKENDS
from finetune.hardware.gpus import Gpu
from finetune.paths import CONF
from finetune.plan import plan

GIB = 1024**3
A100 = Gpu(name="A100", memory_bytes=80 * GIB, capability="8.0")
MACHINE = Machine(cores=16, ram_bytes=256 * GIB, disk_free_bytes=2000 * GIB, gpus=(A100, A100))
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
OVERLAYS = ("experiment", "debug")
OPTIONS = sorted(
    (folder.name, file.stem)
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name not in OVERLAYS
    for file in folder.glob("*.yaml")
    if not file.stem.startswith("_")
    and not (folder.name == "quantization" and file.stem in BACKENDS and BACKENDS[file.stem].reason)
)
"""Methods that do not run are refused by name: tests/hardware."""
NEEDS = {
    ("launch", "multinode"): ["launch.host=10.0.0.1"],
    ("model", "custom"): ["model.name=x"],
    **{
        ("train", name): ["data.objective=preference", "data.format=preference"]
        for name in ("dpo", "orpo", "simpo", "cpo")
    },
    ("train", "kto"): ["data.objective=unpaired", "data.format=unpaired"],
}
NEEDS |= {
    ("train", "grpo"): ["data=people", "train.tokens_per_step=null", "train.grpo.rewards={json_valid: 1.0}"],
    ("data", "people"): ["train=grpo", "train.tokens_per_step=null", "train.grpo.rewards={json_valid: 1.0}"],
    ("data", "prompts"): ["train=grpo", "train.tokens_per_step=null", "train.grpo.rewards={json_valid: 1.0}"],
}
NAMED = ("quickstart", "guanaco", "alpaca_cleaned", "ultrafeedback", "people")
"""Data options that bring their rows; the others are formats, and the user names the rows."""
LISTS = ("export", "tracking")
BESIDE = {("export", "hub"): "card,"}


def test_the_promised_experiments_ship() -> None:
    assert set(EXPERIMENTS) >= {
        "quickstart",
        "llama7b_qlora",
        "llama13b_qlora",
        "llama70b_qlora_fsdp",
        "llama3_8b_qlora",
        "mistral7b_qlora",
        "qwen25_7b_qlora",
        "gemma2_9b_qlora",
        "phi3_mini_qlora",
        "guanaco_7b",
        "qwen3_4b_instruct_qlora",
        "qwen3_8b_qlora",
        "qwen3_30b_a3b_qlora",
        "qwen35_9b_qlora",
        "llama31_8b_instruct_qlora",
        "llama32_3b_instruct_qlora",
        "gemma3_12b_qlora",
        "gemma4_12b_qlora",
        "ministral3_8b_qlora",
        "phi4_qlora",
        "gpt_oss_20b_qlora",
        "smollm3_3b_qlora",
        "r1_distill_qwen_7b_qlora",
    }


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_passes_its_checks_and_is_planned(experiment: str) -> None:
    config = load([f"+experiment={experiment}"])
    assert config.run.name == experiment
    made = plan(config, MACHINE)
    assert made.known
    assert all(value is not None for value in dataclasses.asdict(config).values())


@pytest.mark.parametrize("overlay", sorted(file.stem for file in (CONF / "debug").glob("*.yaml")))
def test_debug_overlay_composes_on_every_experiment(overlay: str) -> None:
    for experiment in EXPERIMENTS:
        assert load([f"+experiment={experiment}", f"+debug={overlay}"]).run.name == f"debug-{overlay}"


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    choice = f"{group}=[{BESIDE.get((group, option), '')}{option}]" if group in LISTS else f"{group}={option}"
    rows = ["data.path=x.jsonl"] if group == "data" and option not in NAMED else []
    assert load(["+experiment=quickstart", choice, *rows, *NEEDS.get((group, option), [])]).run.name == "quickstart"


def test_guanaco_is_the_papers_recipe() -> None:
    config = load(["+experiment=guanaco_7b"])
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets) == (
        64,
        16,
        0.1,
        ["all-linear"],
    )
    assert (config.optim.learning_rate, config.optim.schedule, config.optim.max_grad_norm, config.optim.beta2) == (
        2e-4,
        "constant",
        0.3,
        0.999,
    )
    assert (config.train.steps, config.train.rows_per_step, config.quantization.method, config.quantization.double) == (
        1875,
        16,
        "nf4",
        True,
    )


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_own_rows_take_the_place_of_any_experiments_data(experiment: str) -> None:
    config = load([f"+experiment={experiment}", "data=custom", "data.path=rows.jsonl"])
    assert (config.data.path, config.data.hub, config.data.heldout_path) == ("rows.jsonl", None, None)


def test_names_of_the_users_own_need_no_plus() -> None:
    base = ["+experiment=quickstart", "data=custom"]
    whole = load([*base, "data.path=x.jsonl", "data.columns={prompt: question}"]).data.columns
    assert (
        whole
        == load([*base, "data.path=x.jsonl", "data.columns.prompt=question"]).data.columns
        == {"prompt": "question"}
    )
    sources = load(
        [
            *base,
            "data.path=null",
            "data.sources.a.path=x.jsonl",
            "data.sources.a.weight=2",
            "data.sources.b.path=y.jsonl",
            "data.sources.b.weight=1",
        ]
    ).data.sources
    assert {name: (source.path, source.weight) for name, source in sources.items()} == {
        "a": ("x.jsonl", 2.0),
        "b": ("y.jsonl", 1.0),
    }
