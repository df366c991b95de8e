"""Who set a value: every value of a configuration leads to the line that gave it."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from finetune.cli import main
from finetune.config import compose
from finetune.errors import ConfigError
from finetune.paths import CONF
from finetune.provenance.config_trace import ABSENT, explain, flat, layers, settings

QUICKSTART = ["+experiment=quickstart"]
ROOT = CONF.parent


@pytest.mark.parametrize("experiment", ["quickstart", "llama7b_qlora", "dpo_quick", "qwen25_7b_qlora"])
def test_the_last_who_set_a_key_gave_the_value_that_it_has_and_stands_where_it_is_said(experiment: str) -> None:
    overrides = [
        f"+experiment={experiment}",
        "lora.rank=3",
        "data.columns={prompt: question}",
        "tracking=[wandb,tensorboard]",
    ]
    values = flat(OmegaConf.to_container(compose(overrides), resolve=True))
    chain = layers(overrides)[0]
    assert len(values) > 100
    for key, value in values.items():
        last = settings(key, chain)[-1]
        if value == "???":
            assert last.value in (ABSENT, "???")
        elif "${" not in str(last.value):
            assert last.value == value, key
        if last.by != "command line":
            file, line = last.place.rsplit(":", 1)
            assert key.rsplit(".", 1)[-1] in (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1], (
                last.place
            )


EXPERIMENT, DATACLASS = "conf/experiment/quickstart.yaml:", "because there is no default (finetune/lora/config.py:"


@pytest.mark.parametrize(
    ("key", "override", "expected"),
    [
        ("train.micro_batch", "train.micro_batch=4",
         ["= 4", "by the command line (train.micro_batch=4)", f"without it: 1, by the experiment ({EXPERIMENT}"]),
        ("optim.learning_rate", None,
         [f"by the experiment ({EXPERIMENT}", "without it: 0.0002, by the group (conf/optim/"]),
        ("lora.rank", None, ["by the group (conf/lora/default.yaml:", f"without it: no value, {DATACLASS}"]),
        ("run.root", None, ["run.root = outputs", "by the default (finetune/run.py:", "without it there is no value"]),
        ("run.seed", None, ["by the config (conf/config.yaml:"]),
        ("quantization.double", "quantization=nf4", ["= false", "with quantization=nf4_double it would be true"]),
        ("model.architecture.experts", None, ["= 0", "by the default (finetune/architecture.py:"]),
    ],
)  # fmt: skip
def test_one_key_is_explained(
    key: str, override: str | None, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    explain(key, [*QUICKSTART, *([override] if override else [])])
    said = " ".join(capsys.readouterr().out.split())
    for sentence in expected:
        assert sentence in said


def test_a_group_lists_all_of_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *QUICKSTART, "--explain", "quantization"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        f"quantization.{key}"
        for key in (
            "method",
            "double",
            "skip_modules",
            "skip_modules_mib",
            "skip_modules_tokens",
            "threshold",
            "bits",
            "group_size",
            "calibration_rows",
            "calibration_tokens",
            "steps",
        )
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.batch_size", "train.batch_size: there is no such setting; did you mean train.micro_batch?"),
        ("lora.rnak", "lora.rnak: there is no such setting; did you mean lora.rank?"),
        ("tracking.tensorboard.kind", "tracking.tensorboard.kind: this configuration does not have it"),
    ],
)
def test_a_key_that_is_not_there_is_said_with_the_nearest(
    key: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *QUICKSTART, "--explain", key]) == 2
    assert message in capsys.readouterr().err


def test_what_other_trainers_call_a_setting_is_understood_on_the_command_line_too() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.batch_size: there is no such setting; did you mean train\.micro_batch=4\?"
    ):
        compose([*QUICKSTART, "train.batch_size=4"])


def test_places_are_files_of_this_checkout() -> None:
    chain = layers(QUICKSTART)[0]
    files = {Path(place.rsplit(":", 1)[0]) for layer in chain for place in layer.places.values()}
    assert files
    assert all((ROOT / file).is_file() for file in files)
