"""The command line: what is printed, what is refused, and the exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.config import load
from finetune.errors import ConfigError
from finetune.verbs import recorded, with_experiment

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
        (
            "experiment=quickstart",
            "experiment=quickstart: experiment is an overlay and needs a plus: write +experiment=quickstart",
        ),
        ("quantization.double=true", None),
        ("eval.gate=high", "eval.gate: must be names with a number each, e.g. 'eval.gate={<name>: ...}'; got 'high'"),
        ("lora.targets=q_proj", "lora.targets: must be a list, e.g. 'lora.targets=[q_proj]'; got 'q_proj'"),
        (
            "lora.tokens=[<tool>]",
            "lora.tokens=[<tool>]: cannot be read as an override; write key=value, and quote values that hold spaces or signs",
        ),
        ("tracking=[slate]", "tracking=slate: there is no such option; choose one of tensorboard, wandb"),
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
    (tmp_path / "base.gguf").write_bytes(b"GGUF\xff\xfe")
    for name in (tmp_path / "base.gguf", "someone/model"):
        assert main(["plan", "model=custom", f"model.name={name}"]) == 0
        assert f"no plan: model.name: {name}" in " ".join(capsys.readouterr().out.split())


def test_exports_that_could_only_fail_after_training_are_refused_before_all_at_once() -> None:
    asked = ["safetensors", "bitsandbytes", "onnx", "adapter"]
    numbers = [f"export.{name}.numbers=int3" for name in asked]
    found = problems([f"export=[{','.join(asked)},gguf_lora,hub]", *numbers, "lora=dora", "lora.tokens=[tool]"])
    assert [problem[: problem.find("; got") if "; got" in problem else 60] for problem in found] == [
        "export.safetensors.numbers must be one of bfloat16, float16, float32",
        "export.bitsandbytes.numbers must be one of nf4, fp4, int8",
        "export.onnx.numbers must be one of float32, int8, int4",
        "export.adapter.numbers must be left out, since it is written in one way only",
        "export.gguf_lora: lora.variant=dora, and llama.cpp adds noth",
        "export.hub: a push needs a card, so that others know what it",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "nonsense: it is no setting (write key=value) and no verb (run, plan, bench, replay, diff, data,"),
        (["replay", "run.name=a", "now"], "now: it is no setting"),
        (["--cfg", "job", "nonsense"], "- nonsense: cannot be read as an override; write key=value"),
        (["plan", "explain="], "plan explain: name a setting or a group, e.g. explain=lora.rank"),
        (["plan", "fit=true", "explain=lora.rank"], "plan explain=lora.rank stands alone; leave out fit"),
        (["plan", "fit"], "plan fit: it needs a value, e.g. fit=true"),
        (["plan", "fit=yes"], "plan fit must be true or false; got 'yes'"),
        (["data", "why"], "data why: it needs a value, e.g. why=..."),
        (["eval", "compare"], "eval compare: it needs a value, e.g. compare=..."),
        (["eval", "compare=b", "run.name=a", "eval.rows=5"], "eval compare: eval.rows=5 would have no effect; it takes run.name,"),
        (["replay", "force=maybe"], "replay force must be true or false; got 'maybe'"),
        (["replay", "run.name=a", "lora.rank=3"], "replay: lora.rank=3 would have no effect; it takes run.name, run.root"),
        (["diff", "json=yes", "a", "b"], "diff json must be true or false; got 'yes'"),
        (["bench", "start", "repeats"], "bench start: repeats: there is no such setting; it takes repeats=..."),
        (["bench", "start", "repeats=nan"], "bench start: repeats must be a positive number; got 'nan'"),
        (["bench", "start", "repeats=0.5"], "bench start: repeats must be a whole number; got '0.5'"),
        (["plan", "model=custom", "model.name=/not/there"], "model.name: /not/there cannot be read: No such file or directory"),
        (["merge.adapters={/not/there: 0.5}"], "merge.adapters: /not/there is not an adapter"),
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
    "quantization=nf5: there is no such option; choose one of awq, fp4, gguf, gptq, hqq, int8, nf4, nf4_double, none, qat, "
    "torchao_int4, torchao_int8; did you mean nf4?"
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


def test_without_an_experiment_it_is_the_quickstart() -> None:
    assert with_experiment(["lora.rank=4"]) == ["+experiment=quickstart", "lora.rank=4"]
    assert with_experiment(["+experiment=x"]) == ["+experiment=x"]


def test_bad_input_ends_with_2_and_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora.rnak=3"]) == 2
    assert capsys.readouterr().err == (
        "finetune: 1 problem in the configuration:\n  - lora.rnak: there is no such setting; did you mean lora.rank?\n"
    )


def test_bad_input_beside_a_flag_of_hydra_is_said_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "lora.rnak=3"]) == 2
    assert "did you mean lora.rank?" in capsys.readouterr().err


def test_stage_of_a_run_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run; start one first"):
        recorded([f"run.root={tmp_path}", "run.name=nothing"])


def test_stage_verbs_compose_what_the_run_was_started_with(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "overrides.json").write_text(
        json.dumps(["+experiment=quickstart", "lora.rank=4", "run.if_exists=overwrite"])
    )
    assert recorded([f"run.root={tmp_path}", "run.name=a"]) == ["+experiment=quickstart", "lora.rank=4"]


def test_existing_run_is_refused_with_2_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "precious.txt").write_text("kept")
    assert main([f"run.root={tmp_path}"]) == 2
    assert "holds a run already and nothing is written over it" in capsys.readouterr().err
    assert (tmp_path / "quickstart" / "precious.txt").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments", [["--cfg", "job", "+experiment=llama7b_qlora"], ["plan", "+experiment=llama7b_qlora"]]
)
def test_composing_and_planning_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from finetune.__main__ import main; code = main(sys.argv[1:]); "
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules], code)"
    )
    answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert "HEAVY [] 0" in answer.stdout, answer.stdout + answer.stderr


def test_bench_names_what_it_can_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "weather"]) == 2
    assert "say what to measure, one of data, speed, start" in capsys.readouterr().err
    assert main(["bench", "start", "--help"]) == 0
    assert "start [repeats=]: from the start of a process" in capsys.readouterr().out
