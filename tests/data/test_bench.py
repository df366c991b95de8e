"""The benchmark makes the promised rows, and ends with one line of JSON."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from finetune.bench.data import compare_data_preparation, memory_of_tree, write_rows
from finetune.errors import DataError

ROWS = [{"question": f"How much is {number} and 20?", "answer": f"It is {number + 20}."} for number in range(5)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "gsm.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_repeated_rows_all_differ(source: Path, tmp_path: Path) -> None:
    write_rows(source, tmp_path / "rows.jsonl", rows=50)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(set(lines)) == 50


def test_the_seed_makes_the_same_rows(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_rows(source, tmp_path / name, rows=20, seed=3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_source_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="needs JSON Lines with question and answer"):
        write_rows(tmp_path / "x.jsonl", tmp_path / "rows.jsonl", rows=2)


def test_memory_of_this_process_is_measured() -> None:
    assert memory_of_tree(os.getpid()) > 10 * 1024**2


@pytest.mark.slow
def test_bench_ends_with_a_line_of_json(source: Path, tmp_path: Path, tokenizer: Any, capsys: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    result = compare_data_preparation(source, tokenizer=str(tmp_path / "tokenizer"), rows=400)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == result
    assert {"rows_per_second_ratio", "share_of_tokenizer_speed", "peak_memory_ratio"} <= last.keys()
