"""A preflight that passed is not repeated with the same inputs, and is repeated with any other."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.preflight import result_cache
from finetune.products import CheckRecord, PreflightResult, SkippedCheck
from finetune.trainable import TrainingJob
from tests.fixtures.preflight import Scene, settings

CONFIG = settings("quick")


def changed(job: TrainingJob, **trainable: Any) -> TrainingJob:
    return dataclasses.replace(job, trainable=dataclasses.replace(job.trainable, **trainable))


def passed(folder: Path) -> PreflightResult:
    check = CheckRecord(
        name="identity",
        passed=True,
        figure="0",
        bound="0",
        sentence="it is the same",
        cause="B is not zero",
        seconds=1.0,
    )
    skipped = SkippedCheck(name="reload", sentence="it is the same again", why="only preflight=full")
    return PreflightResult(
        folder=folder, checks=[check], packing_is_isolated=True, fused_layers_are_exact=True, skipped=[skipped]
    )


def test_a_preflight_is_found_by_what_decides_it(scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.undo()  # the scene replaces `find`
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    name = result_cache.name_of(CONFIG, scene.job, until="report")
    assert result_cache.find(name) is None
    (tmp_path / "trained_text.txt").write_text("an answer")
    result = passed(tmp_path)
    result_cache.remember(name, result)
    same = changed(scene.job, model=object())
    assert result_cache.find(result_cache.name_of(CONFIG, same, until="report")) == result
    (tmp_path / "trained_text.txt").unlink()
    result_cache.restore_text(name, tmp_path)
    assert (tmp_path / "trained_text.txt").read_text() == "an answer"


def other_quantization(job: TrainingJob) -> TrainingJob:
    spec = job.trainable.spec
    return changed(
        job, spec=dataclasses.replace(spec, quantization=dataclasses.replace(spec.quantization, method="fp4"))
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda job: dataclasses.replace(job, seed=2),
        lambda job: dataclasses.replace(job, config=dataclasses.replace(job.config, steps=9)),
        lambda job: changed(job, lora=dataclasses.replace(job.trainable.lora, rank=9)),
        other_quantization,
    ],
)
def test_another_setting_is_another_preflight(scene: Scene, change: Callable[[TrainingJob], TrainingJob]) -> None:
    before = result_cache.name_of(CONFIG, scene.job, until="report")
    assert result_cache.name_of(CONFIG, change(scene.job), until="report") != before


def test_another_level_is_another_preflight(scene: Scene) -> None:
    other = dataclasses.replace(CONFIG, rows=5)
    assert result_cache.name_of(other, scene.job, until="report") != result_cache.name_of(
        CONFIG, scene.job, until="report"
    )


def test_other_code_is_another_preflight(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    before = result_cache.name_of(CONFIG, scene.job, until="report")
    monkeypatch.setattr(result_cache, "code", lambda: {"train": "changed"})
    assert result_cache.name_of(CONFIG, scene.job, until="report") != before


def test_a_damaged_file_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    (tmp_path / "trained_text.txt").write_text("an answer")
    result_cache.remember("a", passed(tmp_path))
    (tmp_path / "preflights" / "a.json").write_text("{")
    assert result_cache.find("a") is None
