"""``finetune convert``: training files of other tools become experiments that compose and plan."""

from pathlib import Path

import pytest

from finetune.cli import main
from finetune.config import RunConfig, load

AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
adapter: qlora
load_in_4bit: true
datasets:
  - {path: my.jsonl, ds_type: json, type: alpaca}
val_set_size: 0.05
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
saves_per_epoch: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_ratio: 0.1
bf16: auto
tf32: true
wandb_project:
loss_watchdog_threshold: 5.0
"""
LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-8B
stage: sft
do_train: true
finetuning_type: lora
quantization_bit: 4
lora_target: all
dataset: mine
template: qwen3_nothink
max_steps: 100
save_steps: 50
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
warmup_steps: 10
report_to: none
"""
TRL = """
# a comment
trl sft \\
    --model_name_or_path Qwen/Qwen2.5-0.5B \\
    --dataset_name org/rows --use_peft --load_in_4bit \\
    --lora_target_modules q_proj v_proj \\
    --learning_rate 2.0e-4 --eval_strategy no
"""
DPO = """
base_model: Qwen/Qwen3-8B
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_modules: [model.layers.*.q_proj]
rl: dpo
rl_beta: 0.3
datasets: [{path: org/pairs, split: train, type: chatml.intel}]
learning_rate: 1e-5
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(desk: Path, text: str, name: str) -> tuple[RunConfig, str]:
    """Returns the configuration of a converted file, and the text of the experiment."""
    (desk / name).write_text(text)
    assert main(["convert", name]) == 0
    stem = Path(name).stem
    return load([f"+experiment={stem}"]), (desk / "conf" / "experiment" / f"{stem}.yaml").read_text()


def test_an_axolotl_file_is_the_same_job_here(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, text = converted(desk, AXOLOTL, "qlora.yml")
    assert (config.quantization.method, config.quantization.double) == ("nf4", True)
    assert (config.model.name, config.run.name) == ("NousResearch/Meta-Llama-3-8B", "qlora")
    assert (config.data.path, config.data.format, config.data.heldout_share) == ("my.jsonl", "alpaca", 0.05)
    assert (config.data.max_tokens, config.data.packing) == (2048, True)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (32, 16, 0.05)
    assert config.lora.targets == ["all-linear"]
    assert (config.train.micro_batch, config.train.rows_per_step, config.train.tokens_per_step) == (2, 8, None)
    assert (config.train.epochs, config.train.checkpoints) == (3, 6)
    assert (config.optim.name, config.optim.schedule) == ("paged_adamw_8bit", "cosine")
    assert (config.optim.learning_rate, config.optim.warmup) == (2e-4, 0.1)
    assert "sequence_len: 2048" in text
    assert "loss_watchdog_threshold: 5.0" in text.partition("# Not translated")[2]
    assert "tf32" not in text
    assert "not translated: loss_watchdog_threshold" in capsys.readouterr().out


def test_the_defaults_of_the_tool_are_kept_and_named(desk: Path) -> None:
    config, text = converted(desk, AXOLOTL, "qlora.yml")
    assert config.optim.max_grad_norm == 1.0
    assert "max_grad_norm: 1 # axolotl's default, max_grad_norm: 1.0" in text


def test_a_llama_factory_file_is_the_same_job_here(desk: Path) -> None:
    (desk / "data").mkdir()
    (desk / "data" / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    config, _ = converted(desk, LLAMA_FACTORY, "train.yaml")
    assert config.model.name == "Qwen/Qwen3-8B"
    assert config.model.architecture is not None
    assert (config.data.path, config.data.format) == (str(desk / "data" / "mine.json"), "alpaca")
    assert (config.lora.rank, config.lora.alpha) == (8, 16)
    assert (config.train.steps, config.train.save_steps, config.train.rows_per_step) == (100, 50, 8)
    assert (config.optim.warmup, config.optim.warmup_steps) == (None, 10)
    assert (config.data.too_long, config.tracking) == ("truncate", {})


def test_a_command_line_of_trl_is_the_same_job_here(desk: Path) -> None:
    config, _ = converted(desk, TRL, "sft.sh")
    assert config.model.name == "Qwen/Qwen2.5-0.5B"
    assert (config.quantization.method, config.quantization.double) == ("nf4", False)
    assert config.lora.targets == ["q_proj", "v_proj"]
    assert (config.data.hub, config.train.evaluations, config.train.epochs) == ("org/rows", 0, 3)


def test_preferences_and_what_has_no_counterpart(desk: Path) -> None:
    config, text = converted(desk, DPO, "dpo.yml")
    assert (config.train.objective, config.data.objective) == ("dpo", "preference")
    assert (config.train.preference.beta, config.lora.dropout, config.quantization.method) == (0.3, 0, "none")
    assert "lora_target_modules" in text.partition("# Not translated")[2]
    assert "datasets.type: chatml.intel" in text.partition("# Not translated")[2]


@pytest.mark.parametrize(("objective", "setting", "value"), [("kto", "loss", "kto"), ("orpo", "likelihood", 1)])
def test_an_objective_brings_the_numbers_of_its_option(desk: Path, objective: str, setting: str, value: object) -> None:
    config, _ = converted(desk, DPO.replace("rl: dpo\nrl_beta: 0.3", f"rl: {objective}"), "x.yml")
    assert (config.train.objective, getattr(config.train.preference, setting)) == (objective, value)


def test_values_of_another_type_are_not_translated(desk: Path) -> None:
    text = f"{TRL.rstrip()} --warmup_steps 0.1 --max_steps 12.5\n"
    config, experiment = converted(desk, text, "sft.sh")
    assert (config.optim.warmup, config.optim.warmup_steps, config.train.steps) == (0.1, None, None)
    assert "max_steps: 12.5" in experiment.partition("# Not translated")[2]


def test_a_mistake_in_an_own_experiment_is_named(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "conf" / "experiment").mkdir(parents=True)
    (desk / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nlora: {rnak: 3}\n")
    assert main(["plan", "+experiment=mine"]) == 2
    assert "lora.rnak" in capsys.readouterr().err


def test_a_converted_experiment_plans(desk: Path) -> None:
    converted(desk, LLAMA_FACTORY, "train.yaml")
    assert main(["plan", "+experiment=train", "hardware=rtx4090", "data.path=null"]) == 0


@pytest.mark.parametrize(
    ("content", "rule"),
    [("a: 1\n", "is not a training file of axolotl"), (None, "cannot be read"), ("- x", "is not a training file")],
)
def test_other_files_are_refused(
    desk: Path, capsys: pytest.CaptureFixture[str], content: str | None, rule: str
) -> None:
    if content is not None:
        (desk / "x.yml").write_text(content)
    assert main(["convert", "x.yml"]) == 2
    assert rule in capsys.readouterr().err


def test_an_experiment_is_not_written_over(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(desk, TRL, "sft.sh")
    assert main(["convert", "sft.sh"]) == 2
    assert "exists and is not written over; choose another --name" in capsys.readouterr().err
    assert main(["convert", "sft.sh", "--name", "quickstart"]) == 2
    assert main(["convert", "sft.sh", "--name", "again"]) == 0
