"""Batches and weights are placed so that memory suffices, whatever the lengths; and halved where it does not."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune.architecture import ArchitectureConfig
from finetune.errors import HardwareError
from finetune.inference.budget import (
    MOST_ROWS,
    USABLE_SHARE,
    FreeMemory,
    InferenceCost,
    Workload,
    answer_batches,
    place_weights,
)
from finetune.inference.generation import generate
from finetune.inference.losses import row_losses
from finetune.inference.oom import halve_batches
from finetune.inference.rows import read_rows
from tests.fixtures.artifacts import Line

GIB = 1024**3
LLAMA = ArchitectureConfig(
    family="llama",
    hidden_size=4096,
    intermediate_size=11008,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    tied_embeddings=False,
    max_positions=4096,
)
COST = InferenceCost.of(LLAMA, element_bytes=2)
WEIGHTS = 2 * 6_738_415_616
WORK = Workload(pass_tokens=2048, passes=50, rows=100, prompt_tokens=928, new_tokens=96)


def test_a_token_of_llama_2_7b_takes_half_a_mebibyte_of_keys_and_values() -> None:
    """Known: 2 x 32 layers x 4096 x 2 bytes; one more layer is copied while it grows."""
    assert COST.cache_token_bytes == 33 * 2 * 4096 * 2


@pytest.mark.parametrize("free", [GIB, 3 * GIB, 20 * GIB, 300 * GIB])
def test_batches_fit_and_hold_every_prompt_once(free: int) -> None:
    lengths = [(37 * number) % 900 + 1 for number in range(150)]

    def rows_of(longest: int) -> int:
        return COST.answer_rows(free, prompt_tokens=longest, new_tokens=96)

    batches = list(answer_batches(lengths, rows_of))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        need = COST.fixed_bytes + len(batch) * COST.answer_bytes(prompt_tokens=longest, new_tokens=96)
        assert len(batch) == 1 or need <= free
        assert len(batch) <= MOST_ROWS
    assert max(map(len, batches)) > 1 or free == GIB


def test_more_memory_and_shorter_prompts_never_give_smaller_batches() -> None:
    sizes = [COST.answer_rows(free * GIB, prompt_tokens=500, new_tokens=96) for free in range(1, 60)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    shorter = [COST.answer_rows(8 * GIB, prompt_tokens=tokens, new_tokens=96) for tokens in (2000, 1000, 500, 100)]
    assert shorter == sorted(shorter)


@pytest.mark.parametrize("memory", [2, 6, 12, 16, 24, 48])
def test_weights_and_a_batch_fit_on_the_gpu(memory: int) -> None:
    placed = place_weights(WEIGHTS, cost=COST, workload=WORK, free=FreeMemory(devices=(memory * GIB,), host=64 * GIB))
    on_gpu = placed.max_memory[0] if placed.max_memory else WEIGHTS
    assert on_gpu + placed.working_bytes <= memory * GIB * USABLE_SHARE
    assert on_gpu + placed.offloaded_bytes >= WEIGHTS
    assert placed.working_bytes >= placed.answer_rows * COST.answer_bytes(prompt_tokens=928, new_tokens=96)
    assert bool(placed.offloaded_bytes) == (memory < 16)


def test_the_batch_is_the_one_that_reads_offloaded_weights_least() -> None:
    free = FreeMemory(devices=(12 * GIB,), host=64 * GIB)
    seconds = []
    for rows in (1, 2, 4, 8, 16):
        fixed = Workload(pass_tokens=2048, passes=50, rows=100, prompt_tokens=928, new_tokens=96, batch_rows=rows)
        seconds.append(place_weights(WEIGHTS, cost=COST, workload=fixed, free=free).read_seconds)
    chosen = place_weights(WEIGHTS, cost=COST, workload=WORK, free=free)
    assert chosen.read_seconds == min(seconds)
    assert len(set(seconds)) == len(seconds)


def test_what_does_not_fit_in_host_memory_stays_on_disk() -> None:
    placed = place_weights(WEIGHTS, cost=COST, workload=WORK, free=FreeMemory(devices=(6 * GIB,), host=4 * GIB))
    assert placed.host_bytes == int(4 * GIB * USABLE_SHARE)
    assert placed.disk_bytes > 0
    cpu = place_weights(WEIGHTS, cost=COST, workload=WORK, free=FreeMemory(devices=(6 * GIB,)))
    assert (cpu.host_bytes, set(cpu.max_memory)) == (0, {"cpu"})


def test_a_row_that_never_fits_is_refused() -> None:
    with pytest.raises(HardwareError, match="one row of 2048 tokens needs more memory than is free on the GPU"):
        place_weights(WEIGHTS, cost=COST, workload=WORK, free=FreeMemory(devices=(GIB // 4,), host=GIB))


ERRORS = pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory"), MemoryError()],
    ids=["cuda", "cpu", "python"],
)


def scarce(model: Any, most_rows: int, error: Exception) -> None:
    """Makes forward passes of more rows fail."""

    def hook(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        if keywords["input_ids"].shape[0] > most_rows:
            raise error

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


@ERRORS
def test_batches_are_halved_until_they_fit_with_the_same_results(
    line: Callable[..., Line], tokenizer: Any, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    parts = line("none", dtype="float32")
    model, rows = parts.spec.load(), read_rows(parts.data.folder / "heldout")
    prompts = [row["prompt_ids"] for row in rows]
    losses = row_losses(model, rows, batch_tokens=10_000)
    answers = generate(model, tokenizer, prompts, max_new_tokens=4, batch_rows=None)
    scarce(model, 3, error)
    with halve_batches("eval") as halvings:
        halved = row_losses(model, rows, batch_tokens=10_000)
        assert generate(model, tokenizer, prompts, max_new_tokens=4, batch_rows=8) == answers
    assert [row.loss for row in halved] == pytest.approx([row.loss for row in losses], abs=1e-4)
    assert [row.tokens for row in halved] == [row.tokens for row in losses]
    assert halvings.count == 4  # 10, 5 rows; 8, 4 rows
    printed = " ".join(capsys.readouterr().out.split())
    assert "out of memory with 10 rows" in printed
    assert "continues with half of each batch" in printed


def test_one_row_that_does_not_fit_ends_the_stage(line: Callable[..., Line], tokenizer: Any) -> None:
    parts = line("none", dtype="float32")
    model, rows = parts.spec.load(), read_rows(parts.data.folder / "heldout")
    scarce(model, 0, MemoryError())
    with halve_batches("eval"), pytest.raises(HardwareError, match="memory runs out with one row at a time"):
        generate(model, tokenizer, [rows[0]["prompt_ids"]], max_new_tokens=2, batch_rows=1)


def test_errors_pass_where_no_stage_halves(line: Callable[..., Line], tokenizer: Any) -> None:
    parts = line("none", dtype="float32")
    model = parts.spec.load()
    scarce(model, 0, MemoryError())
    with pytest.raises(MemoryError):
        generate(model, tokenizer, [[5, 6, 7]], max_new_tokens=2, batch_rows=1)
