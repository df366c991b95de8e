"""Packing loses nothing, fills well, and changes no document's loss."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.pack import Packs, pack
from finetune.data.scratch import Scratch
from finetune.inference.rows import IGNORED
from finetune.products import PreparedData
from tests.data.helpers import pair, split

SENTENCES = [
    "Wake me at seven.",
    "The capital of France is Paris.",
    "Book a table for two people tomorrow evening.",
    "0 1 2 3 4 5 6 7 8 9",
]
ROWS = [
    pair(f"{SENTENCES[number % 4]} {number}", SENTENCES[(number + 1) % 4] * (1 + number % 3)) for number in range(24)
]


def packed(lengths: list[int], *, capacity: int, seed: int = 0) -> Packs:
    with TemporaryDirectory() as folder:
        generator = np.random.default_rng(seed)
        scratch = Scratch(Path(folder))
        packs = pack(
            np.arange(len(lengths)), np.array(lengths), capacity=capacity, generator=generator, scratch=scratch
        )
        return Packs(np.array(packs.documents), np.array(packs.starts))


def rows_of(packs: Packs) -> list[list[int]]:
    return [packs.documents[start:end].tolist() for start, end in pairwise(packs.starts)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_every_document_is_packed_once_and_no_row_overflows(lengths: list[int]) -> None:
    packs = packed(lengths, capacity=50)
    assert sorted(packs.documents.tolist()) == list(range(len(lengths)))
    assert np.add.reduceat(np.array(lengths)[packs.documents], packs.starts[:-1]).max() <= 50


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_decreasing_stays_within_its_bound(lengths: list[int]) -> None:
    packs = packed(lengths, capacity=50)
    assert (
        len(packs) <= 11 / 9 * -(-sum(lengths) // 50) * 1.5 + 4
    )  # Johnson's bound is against the optimum, which is near the sum


def test_the_tightest_row_is_chosen() -> None:
    rows = {frozenset(row) for row in rows_of(packed([6, 5, 4, 5], capacity=10))}
    assert rows == {frozenset({0, 2}), frozenset({1, 3})}


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(0, 3))
def test_rows_are_those_of_a_search_in_memory_in_the_order_of_the_seed(lengths: list[int], seed: int) -> None:
    rows: list[list[int]] = []
    last_used: list[int] = []
    for step, document in enumerate(sorted(range(len(lengths)), key=lambda number: -lengths[number])):
        spaces = [50 - sum(lengths[member] for member in row) for row in rows]
        fitting = [number for number, space in enumerate(spaces) if space >= lengths[document]]
        if fitting:
            row = min(fitting, key=lambda number: (spaces[number], -last_used[number]))
            rows[row].append(document)
            last_used[row] = step
        else:
            rows.append([document])
            last_used.append(step)
    order = np.random.default_rng(seed).permutation(len(rows))
    assert rows_of(packed(lengths, capacity=50, seed=seed)) == [rows[row] for row in order]


def test_packed_and_unpacked_rows_hold_the_same_documents(run: Callable[..., PreparedData]) -> None:
    packed, unpacked = run(ROWS, packing=True), run(ROWS, packing=False)
    assert packed.packed_rows < unpacked.packed_rows
    documents = {}
    for row in split(packed, "train"):
        start = 0
        for number, length in zip(row["rows"], row["seq_lengths"], strict=True):
            documents[number] = (row["input_ids"][start : start + length], row["labels"][start : start + length])
            start += length
    assert documents == {row["rows"][0]: (row["input_ids"], row["labels"]) for row in split(unpacked, "train")}


def test_a_packed_documents_first_token_is_never_trained_on(run: Callable[..., PreparedData]) -> None:
    product = run([{"text": text} for text in SENTENCES], packing=True)
    for row in split(product, "train"):
        for start in np.cumsum([0, *row["seq_lengths"][:-1]]):
            assert row["labels"][start] == IGNORED


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_no_documents_loss(attention: str, run: Callable[..., PreparedData], tiny_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation=attention).eval()
    packed = {
        document: loss
        for row in split(run(ROWS, packing=True), "train")
        for document, loss in document_losses(model, row)
    }
    alone = {
        document: loss
        for row in split(run(ROWS, packing=False), "train")
        for document, loss in document_losses(model, row)
    }
    assert packed.keys() == alone.keys()
    assert [packed[row] for row in alone] == pytest.approx(
        list(alone.values()), rel=1e-5
    )  # float32 rounding in another order


def document_losses(model: Any, row: dict[str, Any]) -> list[tuple[int, float]]:
    """Returns the summed loss of each document; positions restart, so that the model isolates documents."""
    import torch

    positions = torch.cat([torch.arange(length) for length in row["seq_lengths"]])
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([row["input_ids"]]), position_ids=positions[None], use_cache=False
        ).logits[0]
    losses = torch.nn.functional.cross_entropy(
        logits[:-1], torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="none"
    )
    by_document = torch.split(torch.cat([torch.zeros(1), losses]), row["seq_lengths"])
    return [(number, float(part.sum())) for number, part in zip(row["rows"], by_document, strict=True)]
