"""Several processes with gloo: they do what one does, loss by loss, and agree on everything that happens on the way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.mixtures import write_mixture
from tests.fixtures.processes import BFLOAT16_TOLERANCE, TOLERANCE, curve, seal, train_together


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tokenizer: Any) -> Path:
    """25 steps of 4 packs from 10 by one process, so that the last step of each epoch reads 2."""
    folder = tmp_path_factory.mktemp("alone")
    [(code, output)] = train_together(folder, tiny_base, tokenizer, count=1, **LONG)
    assert code == 0, output
    return folder


LONG = {"steps": 25, "tokens_per_step": 400, "dropout": 0.0}
PADDED = {"micro_batch": 2, "packing": False, "group_by_length": True}


def seen(folder: Path, count: int) -> list[str]:
    """Documents that went through the model while it trained, filling left out."""
    texts = [text for rank in range(count) for text in (folder / f"seen-{rank}.jsonl").read_text().splitlines()]
    return sorted(str([token for token in json.loads(text) if token]) for text in texts)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_equal_one_loss_by_loss_and_read_each_row_once(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, alone: Path, count: int
) -> None:
    ended = train_together(tmp_path, tiny_base, tokenizer, count=count, **LONG)
    assert [code for code, _ in ended] == [0] * count, ended
    assert curve(tmp_path) == pytest.approx(curve(alone), abs=TOLERANCE)
    assert seen(tmp_path, count) == seen(alone, 1)
    ours, theirs = seal(tmp_path, 25)["progress"], seal(alone, 25)["progress"]
    assert (ours["tokens"], ours["trained"]) == (theirs["tokens"], theirs["trained"])
    assert ours["best_loss"] == pytest.approx(theirs["best_loss"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (PADDED, TOLERANCE),
        ({"plain": True}, TOLERANCE),
        ({**PADDED, "dtype": "bfloat16"}, BFLOAT16_TOLERANCE),
    ],
    ids=["padded rows of like length", "plain steps", "padded rows in bfloat16"],
)
def test_they_equal_one_in_every_form_of_step(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, settings: dict[str, Any], tolerance: float
) -> None:
    for count in (1, 2):
        ended = train_together(
            tmp_path / str(count), tiny_base, tokenizer, count=count, **{**LONG, "steps": 6, **settings}
        )
        assert [code for code, _ in ended] == [0] * count, ended
    assert curve(tmp_path / "2") == pytest.approx(curve(tmp_path / "1"), abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["shared", "each"])
def test_they_train_the_experts_of_a_mixture_as_one_does(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, experts: str
) -> None:
    """Each process's tokens reach other experts: those that get no gradient on one still take part in the sum."""
    base = tmp_path / "base"
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    write_mixture(base, "qwen3_moe", vocab_size=512)
    tokenizer.save_pretrained(base)
    settings = {**LONG, "steps": 4, "rank": 2, "evaluations": 0, "lora_settings": {"experts": experts}}
    for count in (1, 2):
        ended = train_together(tmp_path / str(count), base, tokenizer, count=count, **settings)
        assert [code for code, _ in ended] == [0] * count, ended
    assert curve(tmp_path / "2") == pytest.approx(curve(tmp_path / "1"), abs=TOLERANCE)
    one, two = (load_file(tmp_path / count / "train/adapter/adapter_model.safetensors") for count in "12")
    assert any("experts" in name for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0.0, atol=1e-3)


def test_non_finite_step_on_one_process_is_skipped_on_all(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    ended = train_together(tmp_path, tiny_base, tokenizer, count=2, break_rank=1, **{**LONG, "steps": 4})
    assert [code for code, _ in ended] == [0, 0], ended
    logs = [" ".join(output.split()) for _, output in ended]
    assert all("step 1 is skipped: loss is nan; it read row" in output for output in logs)
    assert logs[0].split("it read")[1][:40] == logs[1].split("it read")[1][:40]
    assert seal(tmp_path, 4)["progress"]["skipped"] == 1


def test_out_of_memory_on_one_process_halves_the_micro_batch_on_all(
    tmp_path: Path, tiny_base: Path, tokenizer: Any
) -> None:
    settings = {**LONG, "steps": 4, "tokens_per_step": 880}
    ended = train_together(tmp_path / "short", tiny_base, tokenizer, count=2, short_rank=1, micro_batch=4, **settings)
    assert [code for code, _ in ended] == [0, 0], ended
    assert all("continues with micro-batches of 2 instead of 4" in " ".join(output.split()) for _, output in ended)
    train_together(tmp_path / "whole", tiny_base, tokenizer, count=2, micro_batch=2, **settings)
    assert curve(tmp_path / "short") == pytest.approx(curve(tmp_path / "whole"), abs=TOLERANCE)


def test_signal_to_one_stops_all_and_another_number_of_processes_continues(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, alone: Path
) -> None:
    ended = train_together(tmp_path, tiny_base, tokenizer, count=2, stop_step=7, **LONG)
    assert [code for code, _ in ended] == [75, 75], ended
    stopped = seal(tmp_path, 8)["progress"]
    ended = train_together(tmp_path, tiny_base, tokenizer, count=3, stop_step=15, **LONG)
    assert [code for code, _ in ended] == [75] * 3, ended
    assert "continues from step 8" in " ".join(ended[0][1].split())
    [(code, output)] = train_together(tmp_path, tiny_base, tokenizer, count=1, **LONG)
    assert code == 0, output
    assert curve(tmp_path) == pytest.approx(curve(alone), abs=TOLERANCE)
    whole = seal(alone, 25)["progress"]
    assert 0 < stopped["tokens"] < whole["tokens"] == seal(tmp_path, 25)["progress"]["tokens"]


def test_process_with_another_base_is_refused_by_all(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    ended = train_together(tmp_path, tiny_base, tokenizer, count=2, stranger=1, **LONG)
    assert [code for code, _ in ended] == [2, 2], ended
    assert "train differently from this one: lora.rank is" in " ".join(ended[0][1].split())


def test_more_processes_than_rows_in_a_step_are_refused(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    ended = train_together(tmp_path, tiny_base, tokenizer, count=2, **{**LONG, "tokens_per_step": 60})
    assert [code for code, _ in ended] == [2, 2], ended
    assert "1 would have nothing to do" in " ".join(ended[0][1].split())
