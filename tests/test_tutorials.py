"""Three tutorials of the manual, run as written on a small random model: their own rows, pairs and text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli import main
from tests.fixtures.pages import commands
from tests.fixtures.rows import write_rows

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
BASES = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B-Base")


def on_own_data(page: str) -> list[list[str]]:
    """Returns the commands of a page that name the reader's model and data; the others need a larger model's time."""
    return [
        words for words in commands(TUTORIALS / page) if {"model.name", "data.path"} <= {key(word) for word in words}
    ]


def key(word: str) -> str:
    return word.partition("=")[0]


def is_name(word: str) -> bool:
    return key(word) == "run.name"


@pytest.fixture
def desk(make_desk: Callable[..., Path]) -> Path:
    """A working directory with what the tutorials speak of: ``rows.jsonl``, ``pairs.jsonl`` and ``books/*.txt``."""
    folder = make_desk(*BASES, rows=60)
    pairs = [{"prompt": f"{n} + 1?", "chosen": str(n + 1), "rejected": str(n)} for n in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "books").mkdir()
    for number in range(60):
        text = f"Chapter {number}. The capital of France is Paris. Book {number} is on the table."
        (folder / "books" / f"{number}.txt").write_text(text)
    write_rows(folder / "rows.jsonl", count=60)
    return folder


@pytest.mark.parametrize(
    ("page", "runs"), [("json.md", ["own"]), ("preference.md", ["dpo"]), ("text.md", ["books", "chat"])]
)
def test_a_tutorial_names_its_runs(page: str, runs: list[str]) -> None:
    named = [word for words in on_own_data(page) for word in words if is_name(word)]
    assert named == [f"run.name={name}" for name in runs]


@pytest.mark.slow
@pytest.mark.usefixtures("real_processes")  # huggingface_hub reads the hub's address when it is imported
@pytest.mark.parametrize("page", ["json.md", "preference.md", "text.md"])
def test_the_first_run_of_a_tutorial_works_as_written(
    page: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, name = next((words, word) for words in on_own_data(page) for word in words if is_name(word))
    assert main(words) == 0, capsys.readouterr().err
    report = json.loads((desk / "outputs" / name.partition("=")[2] / "report.json").read_text())
    assert report["status"] == "complete"
