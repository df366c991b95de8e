"""A checkpoint counts if and only if its seal matches its files."""

from pathlib import Path

import pytest

from finetune.errors import TrainError
from finetune.train.checkpoints import SEAL, choose, commit, prune
from finetune.train.progress import TrainingProgress

IDENTITY = {"data.fingerprint": "abc", "train.steps": 8}


def written(folder: Path, step: int, *, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(b"weights of step %d" % step)
    (path / "trainer_state.json").write_text("{}")
    if sealed:
        commit(path, IDENTITY, progress=TrainingProgress(tokens=100 * step, narrowed={"micro_batch": 2}))
    return path


def test_newest_complete_checkpoint_is_chosen_with_its_progress(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        written(tmp_path, step)
    chosen = choose(tmp_path, IDENTITY)
    assert chosen is not None
    assert (chosen.step, chosen.folder) == (10, tmp_path / "checkpoint-10")
    assert chosen.progress == TrainingProgress(tokens=1000, narrowed={"micro_batch": 2})


def test_checkpoint_without_a_seal_is_deleted_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, 4)
    unfinished = written(tmp_path, 8, sealed=False)
    chosen = choose(tmp_path, IDENTITY)
    assert chosen is not None
    assert chosen.step == 4
    assert not unfinished.exists()
    assert "checkpoint-8 is incomplete; it is deleted and checkpoint-4 is tried" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "trainer_state.json", SEAL])
def test_one_changed_byte_in_any_file_is_found(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, 4)
    content = bytearray((path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (path / file).write_bytes(content)
    assert choose(tmp_path, IDENTITY) is None
    logged = " ".join(capsys.readouterr().out.split())
    assert f"checkpoint-4 is damaged: {file}" in logged
    assert "training starts from the beginning" in logged


def test_missing_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (written(tmp_path, 4) / "trainer_state.json").unlink()
    assert choose(tmp_path, IDENTITY) is None
    assert "trainer_state.json is missing" in " ".join(capsys.readouterr().out.split())


def test_checkpoint_of_another_run_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = written(tmp_path, 4)
    with pytest.raises(
        TrainError,
        match=r"data\.fingerprint was 'abc' and is 'xyz'; train\.steps was 8 and is 9\. A run continues only",
    ):
        choose(tmp_path, {"data.fingerprint": "xyz", "train.steps": 9})
    assert path.is_dir(), "what was refused is not deleted"


def test_without_checkpoints_training_starts_from_the_beginning(tmp_path: Path) -> None:
    assert choose(tmp_path / "missing", IDENTITY) is None


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        written(tmp_path, step)
    prune(tmp_path, keep=2, best_step=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    prune(tmp_path, keep=1, best_step=0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_pruning_leaves_a_checkpoint_that_is_being_written(tmp_path: Path) -> None:
    written(tmp_path, 2)
    written(tmp_path, 4, sealed=False)
    prune(tmp_path, keep=1, best_step=0)
    assert (tmp_path / "checkpoint-2").is_dir()
