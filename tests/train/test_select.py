"""Selection of the step whose weights are the result, and early stopping."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.cache import file_sha256
from finetune.errors import Interrupted, TrainError
from tests.fixtures.trainings import Stopping, train

OVERFITTING: dict[str, Any] = {"evaluations": 12, "checkpoints": 1, "steps": 24, "keep_checkpoints": 1}
"""Two dozen steps at a high rate on the rows of ``tests.fixtures.rows``: the held-out loss falls and then rises."""


def heldout(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}


def diverging(model: Any) -> None:
    """Scales the last norm down from the seventh evaluation on, so that the held-out loss is worse."""
    norm, count = model.get_base_model().model.norm, 0

    def hook(module: Any, _inputs: Any, output: Any) -> Any:
        nonlocal count
        count += not module.training
        return output if module.training or count <= 6 else output * 0.01

    norm.register_forward_hook(hook)


def test_best_weights_are_the_result_with_select_best(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, touch=diverging, select="best", **OVERFITTING)
    losses = heldout(tmp_path)
    best = min(losses, key=lambda step: losses[step])
    assert best < 24, "otherwise the test shows nothing"
    assert (trained.kept_step, trained.best_heldout_loss) == (best, losses[best])
    folder = tmp_path / "train" / "checkpoints"
    assert trained.adapter_sha256 == file_sha256(folder / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"checkpoint-{best}", "checkpoint-24"])
    assert (
        f"selects step {best} of 24: its held-out loss {losses[best]:.4f} is the lowest of 12"
        in capsys.readouterr().out
    )


def test_last_weights_are_the_result_otherwise(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    trained = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, touch=diverging, **OVERFITTING)
    assert trained.kept_step == 24
    assert [path.name for path in (tmp_path / "train" / "checkpoints").iterdir()] == ["checkpoint-24"]


def test_early_stopping_ends_training(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    trained = train(
        tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, touch=diverging, select="best", patience=2, **OVERFITTING
    )
    losses = heldout(tmp_path)
    best = min(losses, key=lambda step: losses[step])
    assert trained.stopped_early
    assert (trained.steps, trained.kept_step) == (best + 4, best)
    again = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, select="best", patience=2, **OVERFITTING)
    assert (again.steps, again.adapter_sha256) == (trained.steps, trained.adapter_sha256), "a stopped run stays stopped"


def test_interrupted_run_remembers_its_best(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    settings: dict[str, Any] = {"tiny_base": tiny_base, "tokenizer": tokenizer, "select": "best", **OVERFITTING}
    whole = train(tmp_path / "a", **settings)
    with pytest.raises(Interrupted):
        train(tmp_path / "b", trackers=Stopping(22), **settings)
    resumed = train(tmp_path / "b", **settings)
    assert (resumed.resumed_from, resumed.kept_step, resumed.best_heldout_loss) == (
        23,
        whole.kept_step,
        whole.best_heldout_loss,
    )
    assert resumed.adapter_sha256 == whole.adapter_sha256


def test_damaged_best_is_refused_with_a_remedy(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    settings: dict[str, Any] = {"tiny_base": tiny_base, "tokenizer": tokenizer, **OVERFITTING}
    trained = train(tmp_path, touch=diverging, select="best", **settings)
    file = tmp_path / "train" / "checkpoints" / f"checkpoint-{trained.kept_step}" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        TrainError, match=r"adapter_model\.safetensors should have sha256 .*train\.select=last run\.if_exists=resume"
    ):
        train(tmp_path, select="best", **settings)
    assert train(tmp_path, select="last", **settings).kept_step == 24
