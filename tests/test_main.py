"""The command line: what is printed, what is refused, and the exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import console
from finetune.cli import main
from finetune.cli.bench import BENCHMARKS
from finetune.cli.command import Command, parse
from finetune.cli.commands import COMMANDS
from finetune.cli.dispatch import find_command
from finetune.cli.settings import saved_overrides
from finetune.config import load
from finetune.errors import ConfigError, FinetuneError, GateMissed, Interrupted, RankFailed

HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "bitsandbytes", "wandb")


def problems(overrides: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(["+experiment=quickstart", *overrides])
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.rnak=3", "lora.rnak: there is no such setting; did you mean lora.rank?"),
        ("+lora.rnak=3", "lora.rnak: there is no such setting; did you mean lora.rank?"),
        ("lora.rank=many", "lora.rank: must be a whole number; got 'many'"),
        ("optim.learning_rate=fast", "optim.learning_rate: must be a number; got 'fast'"),
        ("data.packing=maybe", "data.packing: must be true or false; got 'maybe'"),
        ("lora.rank=0", "lora.rank must be at least 1; got 0"),
        ("optim.learning_rate=inf", "optim.learning_rate must be a finite number; got inf"),
        ("optim.weight_decay=nan", "optim.weight_decay must be a finite number; got nan"),
        ("merge.max_loss_increase=-inf", "merge.max_loss_increase must be a finite number; got -inf"),
        ("export.adapter.max_kl=nan", "export.adapter.max_kl must be a finite number; got nan"),
        ("eval.gate={adapter.loss: inf}", "eval.gate.adapter.loss must be a finite number; got inf"),
        (
            "data.limit=99999999999999999999",
            "data.limit must be at most 9223372036854775807 (64 bit); got one of 67 bits",
        ),
        ("run.seed=4294967296", "run.seed must be below 2^32, which numpy's generators take; got 4294967296"),
        (
            "experiment=quickstart",
            "experiment=quickstart: experiment is an overlay and needs a plus: write +experiment=quickstart",
        ),
        ("quantization.double=true", None),
        ("eval.gate=high", "eval.gate: must be names with a number each, e.g. 'eval.gate={<name>: ...}'; got 'high'"),
        ("lora.targets=q_proj", "lora.targets: must be a list, e.g. 'lora.targets=[q_proj]'; got 'q_proj'"),
        (
            "lora.tokens=[<tool>]",
            "lora.tokens=[<tool>]: cannot be read as an override; write key=value, and quote values that hold spaces "
            "or signs",
        ),
        (
            "tracking=[slate]",
            "tracking=slate: there is no such option; choose one of aim, clearml, comet_ml, dvclive, mlflow, swanlab, "
            "tensorboard, trackio, wandb",
        ),
    ],
)
def test_each_bad_setting_gets_one_sentence(override: str, expected: str | None) -> None:
    if expected is None:
        load(["+experiment=quickstart", override])
    else:
        assert problems([override]) == [expected]


def test_a_base_whose_dimensions_are_not_known_yet_has_no_plan_and_that_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF\xff\xfe")
    assert main(["plan", f"model.name={base}"]) == 0
    assert f"no plan: model.name: {base} has no config.json" in " ".join(capsys.readouterr().out.split())


def test_a_model_of_the_hub_that_cannot_be_reached_is_never_planned_with_anothers_dimensions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for experiment in ([], ["+experiment=qwen25_7b_qlora"]):
        assert main(["plan", *experiment, "model.name=someone/model"]) == 2
        captured = capsys.readouterr()
        assert "model.name=someone/model: the hub cannot be reached and the model is not in the" in captured.err
        assert not captured.out


def test_a_model_that_an_option_names_is_planned_with_that_option(capsys: pytest.CaptureFixture[str]) -> None:
    for experiment in ([], ["+experiment=qwen25_7b_qlora"], ["+experiment=quickstart"]):
        config = load([*experiment, "model.name=google/gemma-2-2b", "model.upcast=norms"])
        assert config.model.architecture is not None
        assert (config.model.architecture.hidden_size, config.model.attention) == (2304, "eager")
        assert config.model.upcast == "norms"
    assert "google/gemma-2-2b is the model of model=gemma2_2b" in " ".join(capsys.readouterr().err.split())
    plans = []
    for choice in ("model.name=meta-llama/Meta-Llama-3-8B", "model=llama3_8b"):
        assert main(["plan", choice, "hardware=rtx4090"]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]


def test_nothing_of_an_option_is_left_where_another_model_is_named(
    tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(["+experiment=gemma2_9b_qlora", f"model.name={tiny_base}"])
    assert (config.model.architecture, config.model.attention) == (None, "auto")
    assert config.lora.rank == load(["+experiment=gemma2_9b_qlora"]).lora.rank
    assert "is not google/gemma-2-9b, the model of model=gemma2_9b" in " ".join(capsys.readouterr().err.split())


def test_an_option_of_ones_own_keeps_its_settings_under_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [llama3_8b, _self_]\nname: /my/llama\n")
    config = load([f"hydra.searchpath=['file://{tmp_path}']", "model=mine"])
    assert config.model.architecture is not None
    assert (config.model.name, config.model.architecture.layers) == ("/my/llama", 32)
    assert not capsys.readouterr().err


def test_exports_that_could_only_fail_after_training_are_refused_before_all_at_once() -> None:
    asked = ["safetensors", "bitsandbytes", "onnx", "adapter"]
    dtypes = [f"export.{name}.dtype=int3" for name in asked]
    found = problems([f"export=[{','.join(asked)},gguf_lora,hub]", *dtypes, "lora=dora", "lora.tokens=[tool]"])
    assert [problem[: problem.find("; got") if "; got" in problem else 60] for problem in found] == [
        "export.safetensors.dtype must be one of bfloat16, float16, float32",
        "export.bitsandbytes.dtype must be one of nf4, fp4, int8",
        "export.onnx.dtype must be one of float32, int8, int4, int8_dynamic",
        "export.adapter.dtype must be left out, since this format has a single dtype",
        "export.gguf_lora: lora.variant=dora, and llama.cpp adds noth",
        "export.hub: a push needs a card, so that others know what it",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "and not a setting (write key=value); the commands are init, convert, run, plan,"),
        (["plna"], "plna: not a command, and not a setting (write key=value); did you mean finetune plan?"),
        (["replay", "run.name=a", "now"], "now: not a setting (write key=value)"),
        (["--cfg", "job", "nonsense"], "- nonsense: not a setting (write key=value)"),
        (["plan", "--explain="], "plan --explain: name a setting or a group, e.g. --explain lora.rank"),
        (["plan", "--fit", "--explain", "lora.rank"], "plan --explain stands alone; leave out --fit"),
        (["plan", "--explain"], "plan --explain needs a value, e.g. --explain KEY"),
        (["plan", "--fit=yes"], "plan --fit takes no value; write --fit"),
        (["plan", "--fti"], "--fti: not a flag of finetune plan; did you mean --fit?"),
        (["plan", "--multirun", "--fit"], "--fit does not go with --multirun; leave one of them out"),
        (["plan", "fit=true"], "fit=true: not a setting, but a flag of plan; write --fit"),
        (["data", "--why"], "data --why needs a value, e.g. --why FILE:LINE"),
        (["eval", "--compare"], "eval --compare needs a value, e.g. --compare RUN"),
        (["eval", "--compare", "b", "run.name=a", "eval.rows=5"],
         "eval --compare: eval.rows=5 would have no effect; it takes run.name,"),
        (["replay", "--force=maybe"], "replay --force takes no value; write --force"),
        (["replay", "run.name=a", "lora.rank=3"],
         "replay: lora.rank=3 would have no effect; it takes run.name, run.root"),
        (["diff", "--json=yes", "a", "b"], "diff --json takes no value; write --json"),
        (["diff", "a"], "diff needs RUN RUN, e.g. finetune diff first second --json; got a"),
        (["bench", "start", "repeats"], "repeats: not a setting (write key=value)"),
        (["bench", "start", "--repeats=nan"], "bench start --repeats must be a positive number; got 'nan'"),
        (["bench", "start", "--repeats", "0.5"], "bench start --repeats must be a whole number; got '0.5'"),
        (["bench", "start", "run.name=a"], "bench start: run.name=a would have no effect; it takes no settings"),
        (["bench", "speed"],
         "bench speed needs ROWS.jsonl, e.g. finetune bench speed gsm8k/train.jsonl --against trl; got nothing"),
        (["--config-dir", "/not/there"], "--config-dir /not/there: there is no such folder"),
        (["train", "--multirun", "lora.rank=1,2"],
         "--multirun: each job is a whole run, or a plan; finetune train takes one run"),
        (["lora.rank=8,16"], "lora.rank: 8,16 is several values, which need --multirun; a list is written [8,16]"),
        (["+lora.rank=8"], "+lora.rank=8: lora.rank is there already; write it without the plus"),
        (["~lora.rank"], "~lora.rank: a setting cannot be removed; give it another value"),
        (["lora=null"], "lora=null: there is no such option; choose one of default, dora,"),
        (["lora.rank=null"], "lora.rank: must be a whole number; got null"),
        (["+experiment=quickstart", "export.gguf.max_kl=3"],
         "export.gguf.max_kl=3: export.gguf is null or not chosen in this configuration"),
        (["+experiment=quickstart", "lora.rank=${lora.nothing}"],
         "lora.rank: Interpolation key 'lora.nothing' not found"),
        (["plan", "model.name=/not/there"],
         "model.name: /not/there is not a folder; give a folder with config.json"),
        (["data.path=rows.jsonl"],
         "no model is chosen: give model.name=<hub id, folder or .gguf file>, model=<option>"),
        (["+experiment=quickstart", "data=custom"], "data: no rows are named; set one of data.path=<file,"),
        (["train"], "run.name: which run? Give run.name=<a run that exists>"),
        (["report"], "run.name: which run? Give run.name=<a run that exists>"),
        (["+experiment=quickstart", "merge.adapters={/not/there: 0.5}"],
         "merge.adapters: /not/there is not an adapter"),
    ],
)  # fmt: skip
def test_what_would_be_dropped_or_could_only_fail_ends_with_2_and_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


NO_NF5 = (
    "quantization=nf5: there is no such option; choose one of awq, fp4, gguf, gptq, hqq, int8, nf4, nf4_double, none, "
    "prequantized, qat, torchao_int4, torchao_int8; did you mean nf4?"
)


def test_option_that_does_not_exist_lists_those_that_do() -> None:
    assert problems(["quantization=nf5"]) == [NO_NF5]


def test_experiment_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match=r"experiment=llama7b: there is no such option; choose one of .*llama7b_qlora"
    ):
        load(["+experiment=llama7b"])


def test_all_problems_are_named_at_once() -> None:
    assert problems(["lora.rnak=3", "lora.rank=many", "quantization=nf5"]) == [
        NO_NF5,
        "lora.rnak: there is no such setting; did you mean lora.rank?",
        "lora.rank: must be a whole number; got 'many'",
    ]
    assert len(problems(["lora.rank=0", "optim.learning_rate=-1", "data.max_tokens=1"])) == 3


def test_debug_before_experiment_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\+debug stands before \+experiment"):
        load(["+debug=limit", "+experiment=quickstart"])


def test_debug_after_experiment_takes_effect() -> None:
    assert load(["+experiment=quickstart", "+debug=limit"]).train.steps == 4


def test_without_an_experiment_the_groups_own_defaults_hold() -> None:
    config = load(["model=llama3_8b", "data.path=rows.jsonl"])
    assert (config.run.name, config.train.epochs, config.train.steps) == ("run", 1.0, None)
    assert (config.optim.learning_rate, config.data.max_tokens, config.data.heldout_share) == (2e-4, 1024, 0.02)


def test_nothing_at_all_prints_the_first_steps_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "make quickstart" in printed
    assert len(printed.splitlines()) < 10
    assert not list(tmp_path.iterdir())


def test_bad_input_ends_with_2_and_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora.rnak=3"]) == 2
    assert capsys.readouterr().err == (
        "finetune: 1 problem in the configuration:\n  - lora.rnak: there is no such setting; did you mean lora.rank?\n"
    )


def test_bad_input_beside_a_flag_of_hydra_is_said_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "lora.rnak=3"]) == 2
    assert "did you mean lora.rank?" in capsys.readouterr().err


def test_a_stage_of_a_run_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run; start one first"):
        saved_overrides([f"run.root={tmp_path}", "run.name=nothing"])


def test_commands_for_one_stage_compose_what_the_run_was_started_with(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "overrides.json").write_text(
        json.dumps(["+experiment=quickstart", "lora.rank=4", "run.if_exists=overwrite"])
    )
    assert saved_overrides([f"run.root={tmp_path}", "run.name=a"]) == ["+experiment=quickstart", "lora.rank=4"]


def test_existing_run_is_refused_with_2_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "precious.txt").write_text("kept")
    assert main(["+experiment=quickstart", f"run.root={tmp_path}"]) == 2
    assert "holds a run already and nothing is written over it" in capsys.readouterr().err
    assert (tmp_path / "quickstart" / "precious.txt").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cfg", "job", "+experiment=llama7b_qlora"],
        ["plan", "+experiment=llama7b_qlora"],
        ["--version"],
        ["config", "lora.rank"],
    ],
)
def test_composing_and_planning_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from finetune.cli import main; code = main(sys.argv[1:]); "
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules], code)"
    )
    answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert "HEAVY [] 0" in answer.stdout, answer.stdout + answer.stderr


def test_bench_names_what_it_can_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "weather"]) == 2
    assert "name what to measure, one of data, speed, start" in capsys.readouterr().err
    assert main(["bench", "start", "--help"]) == 0
    assert "time from the start of a process" in capsys.readouterr().out


def test_help_is_one_screen_with_every_command_and_three_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    for command in COMMANDS:
        assert sum(line.startswith(f"  {command.name} ") for line in lines) == 1
    assert sum(line.startswith("  finetune ") for line in lines[lines.index("Examples") : lines.index("Settings")]) == 3


@pytest.mark.parametrize("command", [*COMMANDS, *BENCHMARKS], ids=lambda command: command.name)
def test_help_of_a_command_is_about_it_and_its_flags(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.split()[: 1 + len(command.name.split())] == ["finetune", *command.name.split()]
    for option in command.options:
        assert option.about in out
    words = command.example.split()[1:]
    found, rest = find_command(words)
    assert found.name.split()[0] == command.name.split()[0]
    parse(found, rest)


def test_version_names_the_libraries_that_decide_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["finetune", "torch", "transformers", "trl", "peft", "bitsandbytes"]


def test_groups_list_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--groups"]) == 0
    out = capsys.readouterr().out
    assert "default, dora, eva, loftq, olora, pissa, rslora" in out
    assert "launch     ddp, deepspeed, fsdp, multinode, single" in out


def test_a_folder_of_ones_own_adds_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.yaml").write_text("defaults: [default]\nrank: 5\n")
    assert main(["--cfg", "job", "--config-dir", str(tmp_path), "lora=mine"]) == 0
    assert "rank: 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("x"), 2), (Interrupted("x"), 75), (GateMissed("x"), 1), (RankFailed("x", exit_code=3), 3)],
)
def test_the_exit_code_belongs_to_the_error(error: FinetuneError, code: int) -> None:
    assert error.exit_code == code


@pytest.mark.parametrize(
    ("flags", "fit", "exact"), [(["--fit"], True, False), (["--exact"], False, True), ([], False, False)]
)
def test_flags_of_plan_are_on_or_off(flags: list[str], fit: bool, exact: bool) -> None:
    command, words = find_command(["plan", *flags, "lora.rank=4"])
    invocation = parse(command, words)
    assert (invocation.options["fit"], invocation.options["exact"]) == (fit, exact)
    assert invocation.overrides == ["lora.rank=4"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--hydra-help"], "See https://hydra.cc"),
        (["--info", "searchpath"], "Config search path"),
        (["--shell-completion", "install=bash"], "hydra_bash_completion"),
        (["plan", "--cfg", "job", "lora.rank=5"], "rank: 5"),
        (["plan", "--multirun", "model=llama3_8b", "lora.rank=4,8"], "training peaks at"),
    ],
)
def test_flags_of_hydra_work_after_the_command(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 0
    assert expected in capsys.readouterr().out


def test_problems_of_planned_jobs_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--multirun", "lora.rank=4,8", "lora.rnak=3"]) == 2
    assert capsys.readouterr().err.endswith(
        "finetune: 1 problem in the configuration:\n  - lora.rnak: there is no such setting; did you mean lora.rank?\n"
    )


def test_a_flag_may_have_a_letter() -> None:
    command, words = find_command(["plan", "-v", "lora.rank=4"])
    assert parse(command, words).options["verbose"]


@pytest.mark.parametrize("words", [["-q"], ["run", "--quiet"], ["train", "-q", "run.name=quiet"]])
def test_a_quiet_run_prints_its_end(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pipeline(*_: object) -> None:
        console.table("plan", ["stage", "GiB"], [["load", "1.0"]])
        console.log("train", "72 of 72 steps")
        console.log("report", "the whole run on one page: report.html")

    monkeypatch.setattr("finetune.cli.run._run_pipeline", pipeline)
    monkeypatch.setattr("finetune.cli.run.saved_overrides", lambda _: [])
    try:
        assert main([*words, "+experiment=quickstart", f"run.root={tmp_path}"]) == 0
    finally:
        console.be_quiet(False)
    assert capsys.readouterr().out == "report     the whole run on one page: report.html\n"
