"""README's own commands for a user's data, as written there."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli import main
from tests.fixtures.hub import FakeHub

README = Path(__file__).parents[1] / "README.md"
SECTION = README.read_text(encoding="utf-8").split("## Your own data\n")[1].split("\n### ")[0]
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"```\n(.*?)```", SECTION, re.S)
    for line in block.splitlines()
]
LOOKS = [words for words in COMMANDS if words[0] in ("init", "plan", "data")]
RUNS = [words for words in COMMANDS if words not in LOOKS]
BASES = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B")


@pytest.fixture
def at_the_users_desk(make_desk: Callable[..., Path]) -> Path:
    """A working directory with ``rows.jsonl``, and a hub with small random models under the names in README."""
    return make_desk(*BASES, rows=300)


def test_the_section_has_what_a_user_types_first() -> None:
    assert [words[0] for words in COMMANDS[:2]] == ["init", "plan"]
    assert COMMANDS[2] == RUNS[0] == ["+experiment=mine"]
    assert len(LOOKS) == 7
    assert len(RUNS) == 2


def test_what_only_looks_runs_as_written_and_fetches_no_weights(
    at_the_users_desk: Path, fake_hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in [*LOOKS, *([*run, "run.until=data"] for run in RUNS)]:
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert not fake_hub.weights


@pytest.mark.slow
@pytest.mark.usefixtures("real_processes")  # huggingface_hub reads the hub's address when it is imported
def test_the_whole_run_works_as_written(at_the_users_desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(LOOKS[0]) == 0
    assert main(RUNS[0]) == 0, capsys.readouterr().err
    report = json.loads((at_the_users_desk / "outputs" / "mine" / "report.json").read_text())
    assert report["status"] == "complete"
    assert report["train"]["steps"] >= 1
    assert {export["format"] for export in report["export"]} == {"adapter", "safetensors", "card"}
