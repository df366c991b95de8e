"""``finetune init``: an experiment for the user's own model and rows, found from the working directory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.config import load
from tests.fixtures.hub import FakeHub

BASE = "org/base"


@pytest.fixture
def desk(make_desk: Callable[..., Path]) -> Path:
    return make_desk(BASE, rows=50)


def test_init_writes_an_experiment_that_plans(
    desk: Path, fake_hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--model", BASE, "--data", "rows.jsonl", "--name", "mine"]) == 0, capsys.readouterr().err
    text = (desk / "conf" / "experiment" / "mine.yaml").read_text()
    config = load(["+experiment=mine"])
    assert (config.model.name, config.data.path, config.run.name) == (BASE, "rows.jsonl", "mine")
    assert config.data.format not in ("auto", "text")
    assert "# the tokenizer's own" in text
    assert "the smallest card that holds training: 8 GB" in text
    assert main(["plan", "+experiment=mine"]) == 0
    assert not fake_hub.weights


def test_length_and_objective_follow_the_rows(desk: Path) -> None:
    rows = [{"prompt": "2+2?", "chosen": "four " * 500, "rejected": "5"} for _ in range(30)]
    (desk / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["init", "--model", BASE, "--data", "pairs.jsonl"]) == 0
    config = load(["+experiment=pairs"])
    assert (config.train.objective, config.data.objective, config.data.format) == ("dpo", "preference", "preference")
    assert config.data.max_tokens in (1024, 2048)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--data", "rows.jsonl"], "init needs --model"),
        (["--model", BASE, "--data", "nope.jsonl"], "nope.jsonl"),
        (["--model", BASE, "--data", "rows.jsonl", "--name", "quickstart"], "exists and is not written over"),
        (["--model", BASE, "--data", "rows.jsonl", "--name", "a/b"], "must be letters"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    desk: Path, capsys: pytest.CaptureFixture[str], words: list[str], rule: str
) -> None:
    assert main(["init", *words]) == 2
    assert rule in capsys.readouterr().err
    assert not (desk / "conf").exists()
