"""Arrays and sorted keys on disk give what numpy gives in memory, and memory does not grow with the rows."""

import errno
import io
import multiprocessing
import os
import resource
import sqlite3
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data import ledger as ledger_module
from finetune.data import read as read_module
from finetune.data import scratch as scratch_module
from finetune.data.checks import similar as similar_module
from finetune.data.scratch import Keys, Scratch, database
from finetune.products import PreparedData
from finetune.system_errors import as_system_error
from tests.data.helpers import checks, ledger, pair, split, write_jsonl

LARGEST = 2**64 - 1
KEYS = st.lists(st.tuples(st.sampled_from([0, 1, 2**63 - 1, 2**63, LARGEST]), st.integers(0, 2)), max_size=60)
WORDS = ["river", "stone", "cloud", "lamp", "paper", "green", "seven", "quick", "train", "house", "water", "glass"]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    scratch = Scratch(tmp_path / "work")
    yield scratch
    scratch.delete()
    assert not (tmp_path / "work").exists()


def filled(keys: Keys, values: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second = (np.array([value[at] for value in values], np.uint64) for at in (0, 1))
    numbers = np.arange(len(values)) + 100
    for part in np.array_split(np.arange(len(values)), 3):
        keys.add(numbers[part], first[part], second[part])
    return numbers, first, second


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=KEYS)
def test_keys_sort_group_and_repeat_as_numpy_does(values: list[tuple[int, int]], scratch: Scratch) -> None:
    with scratch.keys() as keys:
        numbers, first, second = filled(keys, values)
        order = np.concatenate([*keys.in_order(), np.zeros(0, np.int64)])
        assert order.tolist() == numbers[np.lexsort((second, first))].tolist()
        assert np.concatenate([*keys.in_order(start=2, size=5), order[:0]]).tolist() == order[2:7].tolist()
        different: dict[tuple[int, int], int] = {}
        expected = []
        for number, value in zip(numbers.tolist(), values, strict=True):
            if different.setdefault(value, number) != number:
                expected.append((different[value], number))
        repeats = [row for chunk in keys.repeats() for row in zip(*map(np.ndarray.tolist, chunk), strict=True)]
        assert sorted(repeats) == sorted(expected)
        groups = [row for chunk in keys.groups() for row in zip(*map(np.ndarray.tolist, chunk), strict=True)]
        assert groups == [(*key, values.count(key)) for key in sorted(different)]


def test_the_first_number_added_is_the_original_even_if_it_is_larger(scratch: Scratch) -> None:
    with scratch.keys() as keys:
        keys.add(np.array([9, 3]), np.array([5, 5], np.uint64))
        assert [chunk.tolist() for pair_of in keys.repeats() for chunk in pair_of] == [[9], [3]]


def test_what_is_written_outlives_the_release_of_its_memory(scratch: Scratch) -> None:
    array = scratch.array(np.int32, 10, fill=-1)
    array[3] = 7
    scratch.release()
    assert array.tolist() == [-1, -1, -1, 7, *[-1] * 6]
    assert scratch.collect(iter([array[:2], array[3:4]])).tolist() == [-1, -1, 7]


def test_sorting_leaves_nothing_in_the_system_folder(
    scratch: Scratch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch_module, "CACHE_KIB", 1)
    with scratch.keys() as keys:
        keys.add(np.arange(80_000), np.random.default_rng(0).integers(0, 2**63, 80_000, dtype=np.uint64))
        order = keys.in_order()
        next(order)
        opened = [Path(os.readlink(entry.path)) for entry in os.scandir("/proc/self/fd")]
        assert [file for file in opened if file.parent == tmp_path / "work" and file.name.startswith("etilqs")]


def test_what_a_killed_process_left_is_removed(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    left = tmp_path / "out0" / ".work"
    Scratch(left)
    with database(left / "texts") as connection:
        connection.execute("CREATE TABLE answers (row INTEGER)")
        connection.execute("COMMIT")
    assert run([pair()]).train_rows == 1
    assert not left.exists()


def message_with_little_disk(run: Callable[..., PreparedData], path: str, limit: int, sender: Any) -> None:
    """Sends how a preparation ends where no file may be larger than ``limit`` bytes."""
    sys.stdout = sys.stderr = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(path=path, heldout_rows=5)
    except (OSError, sqlite3.OperationalError) as error:
        sender.send(as_system_error(error, Path("outputs")))
    sender.close()


@pytest.mark.parametrize("limit", [20_000, 60_000], ids=["tokens", "texts"])
def test_a_full_disk_is_an_error_of_the_system(
    limit: int, run: Callable[..., PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch_module, "CACHE_KIB", 1)
    rows = [{**pair(f"What is {number}?", f"It is {number}."), "tests": "assert True\n" * 60} for number in range(400)]
    path = str(write_jsonl(tmp_path / "many.jsonl", rows))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=message_with_little_disk, args=(run, path, limit, sender))
    process.start()
    sender.close()
    assert receiver.recv().errno in (errno.EFBIG, errno.ENOSPC, errno.EIO)
    process.join()
    assert process.exitcode == 0


def varied_rows() -> list[dict[str, str]]:
    generator = np.random.default_rng(3)
    sentences = [" ".join(generator.choice(WORDS, int(generator.integers(3, 40)))) for _ in range(120)]
    rows = [pair(sentence, sentences[-number]) for number, sentence in enumerate(sentences)]
    near = [pair(f"{row['prompt']} indeed", row["completion"]) for row in rows[::6]]
    return [*rows, *rows[::9], *near, pair("no answer", ""), pair(rows[4]["prompt"], "another answer")]


CHANGES: list[dict[str, Any]] = [
    {"packing": True, "heldout_share": 0.2},
    {"packing": True, "heldout_rows": 9, "duplicates": "keep", "max_tokens": 100, "pack_tokens": 230},
    {"heldout_path": "own", "leaked": "drop"},
    {"heldout_path": "own", "leaked": "keep", "duplicates": "keep"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_size_of_chunks_changes_nothing(
    changes: dict[str, Any], run: Callable[..., PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = varied_rows()
    if "heldout_path" in changes:
        changes = changes | {"heldout_path": str(write_jsonl(tmp_path / "held.jsonl", rows[20:60]))}
    strict = checks(near_duplicate_share=0.0, overlap_rows_share=0.0)
    whole = run(rows, bad_rows="drop", checks=strict, **changes)
    monkeypatch.setattr(scratch_module, "CHUNK_ROWS", 7)
    parts = run(rows, bad_rows="drop", checks=strict, **changes)
    assert ledger(whole) == ledger(parts)
    assert [split(whole, name) for name in ("train", "heldout")] == [
        split(parts, name) for name in ("train", "heldout")
    ]
    assert (whole.rows, whole.warnings, whole.lengths) == (parts.rows, parts.warnings, parts.lengths)
    assert (whole.tokens, whole.trained_tokens, whole.longest) == (parts.tokens, parts.trained_tokens, parts.longest)


def test_memory_does_not_grow_with_the_rows(run: Callable[..., PreparedData], monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in (
        (scratch_module, ["CHUNK_ROWS"]),
        (ledger_module, ["BATCH_ROWS"]),
        (read_module, ["BATCH_ROWS"]),
        (similar_module, ["BATCH_DOCUMENTS", "SAMPLE_DOCUMENTS"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 100)
    counts, peaks = (500, 1500), []
    for count in counts:
        rows = [pair(f"{WORDS[number % 12]} {number}", f"{WORDS[number % 7]} {number}") for number in range(count)]
        run(rows[:20], packing=True, heldout_share=0.1)
        tracemalloc.start()
        run(rows, packing=True, heldout_share=0.1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (counts[1] - counts[0]) < 100
