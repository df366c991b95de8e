"""A run done again from its folder: equal to the bit, or refused with what differs; and two runs side by side."""

import json
import shutil
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.provenance.difference import compare, differences, named, read
from finetune.provenance.replay import SUFFIX, judge
from finetune.run import write_json
from tests.fixtures.tiny_run import TinyRun

pytestmark = pytest.mark.slow


@pytest.fixture
def finished(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A copy of the tiny run, to be spoilt."""
    assert tiny_run.code == 0, tiny_run.said
    return shutil.copytree(tiny_run.folder, tmp_path / "tiny")


def again(folder: Path, *more: str) -> int:
    return main(["replay", f"run.root={folder.parent}", f"run.name={folder.name}", *more])


def change(file: Path, *path: str, to: object) -> None:
    content = json.loads(file.read_text())
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    write_json(file, content)


def test_the_same_run_comes_out_equal_to_the_bit(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert again(finished) == 0
    assert "equal to the bit" in capsys.readouterr().out
    other = finished.with_name(finished.name + SUFFIX)
    changed = {item.key for item in differences(read(finished), read(other)) if item.part == "config"}
    assert changed == {"run.name", "run.root", "run.if_exists"}
    assert main(["diff", f"run.root={finished.parent}", finished.name, other.name]) == 0
    assert "run.name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("environment.json", ("code", "lora"), "0" * 16, "code.lora was 0000000000000000 and is"),
        ("environment.json", ("versions", "torch"), "1.0.0", "versions.torch was 1.0.0 and is"),
        ("environment.json", ("python",), "3.8.0", "python was 3.8.0 and is 3.1"),
        ("model/manifest.json", ("product", "sha256"), "1" * 64, "had hash 111111111111 and have"),
        (
            "data/manifest.json",
            ("product", "fingerprint"),
            "2" * 64,
            "the prepared data had fingerprint 222222222222 and have",
        ),
    ],
)
def test_what_it_was_made_with_must_be_the_same(
    finished: Path, capsys: pytest.CaptureFixture[str], file: str, path: tuple[str, ...], value: str, message: str
) -> None:
    change(finished / file, *path, to=value)
    assert again(finished) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "restore it, or add --force" in error
    assert not (finished.with_name(finished.name + SUFFIX) / "train").exists()


def test_another_row_of_data_is_refused(tiny_run: TinyRun, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny_run.home / "train.jsonl"
    before = rows.read_text()
    try:
        rows.write_text(before.replace("Monday", "Tuesday"))
        assert again(finished) == 2
    finally:
        rows.write_text(before)
    assert "the prepared data had fingerprint" in capsys.readouterr().err


def test_a_run_that_did_not_finish_is_not_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "half").mkdir()
    assert again(tmp_path / "half") == 2
    assert "so there is nothing to replay" in capsys.readouterr().err


def test_another_adapter_is_said_with_its_distance_and_another_score_with_its_interval(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(finished, tmp_path / "other")
    assert judge(finished, other, alike=True).holds
    file = other / "train" / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name] = weights[name] + 0.25
    save_file(weights, file)
    outcome = judge(finished, other, alike=True)
    assert (outcome.equal, outcome.within, outcome.holds) == (False, True, False)
    assert judge(finished, other, alike=False).holds
    assert "0.25" in capsys.readouterr().out
    change(other / "eval" / "manifest.json", "product", "artifacts", "adapter", "loss", to=99.0)
    outcome = judge(finished, other, alike=False)
    assert (outcome.within, outcome.holds) == (False, False)
    assert "missed" in capsys.readouterr().out


def test_what_differs_is_listed_and_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(finished, tmp_path / "other")
    assert compare(finished, other) == []
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("rank: 16", "rank: 8"))
    change(other / "train" / "manifest.json", "product", "final_loss", to=1.5)
    assert [(item.part, item.key) for item in compare(finished, other)] == [
        ("config", "lora.rank"),
        ("figures", "train.final_loss"),
    ]
    capsys.readouterr()
    assert main(["diff", str(finished), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"part": "config", "key": "lora.rank", "one": 16, "two": 8}


def test_entries_of_a_list_are_told_apart_by_their_names() -> None:
    record = {"candidates": [{"name": "a", "loss": 1.0}], "curve": [{"step": 1}], "skip": []}
    assert named(record) == {"candidates.a.name": "a", "candidates.a.loss": 1.0, "skip": []}
