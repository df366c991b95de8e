"""What was proved of the very same is not proved again; anything else is."""

import dataclasses
from typing import Any, NamedTuple

import pytest

from finetune.preflight import result_cache
from finetune.preflight.config import PreflightConfig


class UpcomingRun(NamedTuple):
    train: PreflightConfig
    until: str
    make_trainer: Any


CONFIG = PreflightConfig(level="quick", rows=4, steps=8)
AHEAD = UpcomingRun(train=CONFIG, until="report", make_trainer=print)
INPUTS: dict[str, Any] = {"seed": 1, "quantization": {"method": "nf4"}, "adapted": object()}


def test_a_rehearsal_is_found_by_what_decides_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    name = result_cache.name_of(CONFIG, INPUTS, AHEAD)
    assert result_cache.find(name) is None
    (tmp_path / "trained_text.txt").write_text("an answer")
    result_cache.keep(name, {"proofs": [{"name": "identity"}]}, tmp_path)
    assert result_cache.find(result_cache.name_of(CONFIG, {**INPUTS, "adapted": object()}, AHEAD)) == {
        "proofs": [{"name": "identity"}]
    }
    (tmp_path / "trained_text.txt").unlink()
    result_cache.restore_text(name, tmp_path)
    assert (tmp_path / "trained_text.txt").read_text() == "an answer"


@pytest.mark.parametrize(
    ("config", "inputs", "ahead"),
    [
        (dataclasses.replace(CONFIG, rows=5), INPUTS, AHEAD),
        (CONFIG, {**INPUTS, "seed": 2}, AHEAD),
        (CONFIG, {**INPUTS, "quantization": {"method": "fp4"}}, AHEAD),
        (CONFIG, INPUTS, AHEAD._replace(train=dataclasses.replace(CONFIG, steps=9))),
    ],
)
def test_another_setting_is_another_rehearsal(config: Any, inputs: Any, ahead: Any) -> None:
    assert result_cache.name_of(config, inputs, ahead) != result_cache.name_of(CONFIG, INPUTS, AHEAD)


def test_other_code_is_another_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = result_cache.name_of(CONFIG, INPUTS, AHEAD)
    monkeypatch.setattr(result_cache, "code", lambda: {"train": "changed"})
    assert result_cache.name_of(CONFIG, INPUTS, AHEAD) != before


def test_a_damaged_memory_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    (tmp_path / "trained_text.txt").write_text("an answer")
    result_cache.keep("a", {}, tmp_path)
    (tmp_path / "rehearsals" / "a.json").write_text("{")
    assert result_cache.find("a") is None
