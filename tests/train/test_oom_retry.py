"""After out-of-memory, training continues with smaller micro-batches and the same rows in every step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import Interrupted, TrainError
from finetune.memory import is_out_of_memory
from finetune.train.checkpoints import SEAL
from tests.fixtures.trainings import Stopping, train

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1073741824 bytes."
)


def scarce(most_tokens: int, *, error: Exception, from_call: int = 0) -> Callable[[Any], None]:
    """Makes training forward passes of more than ``most_tokens`` tokens fail."""

    def touch(model: Any) -> None:
        count = 0

        def hook(module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
            nonlocal count
            count += module.training
            if module.training and count > from_call and keywords["input_ids"].numel() > most_tokens:
                raise error

        model.get_base_model().model.register_forward_pre_hook(hook, with_kwargs=True)

    return touch


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU), MemoryError()],
    ids=["cuda", "cpu", "python"],
)
def test_micro_batch_is_halved_and_a_step_reads_as_many_rows(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    whole = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer, micro_batch=4, tokens_per_step=440)
    capsys.readouterr()
    trained = train(
        tmp_path / "b",
        tiny_base=tiny_base,
        tokenizer=tokenizer,
        micro_batch=4,
        tokens_per_step=440,
        touch=scarce(300, error=error),
    )
    logged = " ".join(capsys.readouterr().out.split())
    assert (
        "continues with micro-batches of 2 instead of 4, 2 accumulated instead of 1, so that a step reads the same rows"
        in logged
    )
    assert (trained.micro_batch, trained.steps, trained.tokens) == (2, 12, whole.tokens)
    assert trained.final_loss == pytest.approx(whole.final_loss, abs=0.05)


def test_training_continues_from_the_last_complete_step(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    full = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer, micro_batch=2, tokens_per_step=440)
    capsys.readouterr()
    touch = scarce(150, error=MemoryError(), from_call=11)
    trained = train(
        tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, micro_batch=2, tokens_per_step=440, touch=touch
    )
    assert "out of memory after step 6" in capsys.readouterr().out
    assert (tmp_path / "b/train/checkpoints/checkpoint-6" / SEAL).is_file()
    assert (trained.tokens, trained.trained_tokens) == (full.tokens, full.trained_tokens), (
        "the rows of the step that failed count once"
    )
    assert [line["step"] for line in trained.curve if "train/loss" in line] == list(range(1, 13))
    assert [line.get("train/loss") for line in trained.curve[:5]] == [line.get("train/loss") for line in full.curve[:5]]


def test_resumed_run_keeps_the_smaller_micro_batch(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    settings: dict[str, Any] = {
        "tiny_base": tiny_base,
        "tokenizer": tokenizer,
        "micro_batch": 2,
        "tokens_per_step": 440,
    }
    touch = scarce(150, error=MemoryError(), from_call=11)
    whole = train(tmp_path / "a", touch=touch, **settings)
    with pytest.raises(Interrupted):
        train(tmp_path / "b", touch=scarce(150, error=MemoryError(), from_call=11), trackers=Stopping(8), **settings)
    resumed = train(tmp_path / "b", touch=scarce(150, error=MemoryError()), **settings)
    assert (resumed.resumed_from, resumed.micro_batch) == (9, 1)
    assert resumed.adapter_sha256 == whole.adapter_sha256


def test_out_of_memory_in_the_first_optimizer_step_restarts_from_the_first_weights(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.optim.optimizer import Optimizer2State

    settings: dict[str, Any] = {"tiny_base": tiny_base, "tokenizer": tokenizer, "tokens_per_step": 440}
    small = train(tmp_path / "a", micro_batch=1, **settings)
    update, calls = Optimizer2State.update_step, 0

    def run_out_of_memory(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        update(self, *arguments)
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Optimizer2State, "update_step", run_out_of_memory)
    trained = train(tmp_path / "b", micro_batch=2, **settings)
    assert trained.micro_batch == 1
    assert trained.adapter_sha256 == small.adapter_sha256


def test_too_little_memory_for_one_row_saves_and_names_the_remedy(
    tmp_path: Path, tiny_base: Path, tokenizer: Any
) -> None:
    with pytest.raises(TrainError, match=r"with one row at a time .*step 3 is saved\. Use fewer tokens in a row"):
        train(
            tmp_path,
            tiny_base=tiny_base,
            tokenizer=tokenizer,
            touch=scarce(0, error=MemoryError(), from_call=7),
            checkpoints=0,
        )
    assert train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, checkpoints=0).resumed_from == 3


def test_other_errors_are_not_out_of_memory() -> None:
    assert is_out_of_memory(RuntimeError(CPU))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
