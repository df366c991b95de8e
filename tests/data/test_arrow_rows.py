"""What Arrow, Parquet, pandas and spreadsheets add to rows is not trained on, and is counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune.data.files import rows
from finetune.errors import DataError


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "tools": [{"name": "weather", "parameters": {"properties": {"city": {"type": "string", "enum": ["a", None]}}}}],
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "tool_calls": [call("weather", {"city": "Rome"})]},
        ],
    },
    {
        "tools": [{"name": "add", "parameters": {"properties": {"a": {"type": "number"}, "b": {"type": "number"}}}}],
        "messages": [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "tool_calls": [call("add", {"a": 1, "b": 2})]},
        ],
    },
]


def as_arrow(table: pyarrow.Table, file: Path) -> Path:
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return file


def as_parquet(table: pyarrow.Table, file: Path) -> Path:
    pyarrow.parquet.write_table(table, file)
    return file


def read(file: Path) -> tuple[list[Any], Counter[str]]:
    changes: Counter[str] = Counter()
    return [row for _, row in rows(file, text_unit="line", changes=changes)], changes


@pytest.mark.parametrize(("write", "name"), [(as_parquet, "rows.parquet"), (as_arrow, "rows.arrow")])
def test_tools_and_calls_have_only_their_own_parameters(tmp_path: Path, write: Any, name: str) -> None:
    """Their columns have one type each, with the parameters of both tools."""
    found, changes = read(write(pyarrow.Table.from_pylist(TOOLS), tmp_path / name))
    assert json.dumps(found, sort_keys=True) == json.dumps(TOOLS, sort_keys=True)
    assert changes["null fields"] > 6


def test_column_without_a_value_is_null_and_not_a_number(tmp_path: Path) -> None:
    """pandas writes an empty column of texts as floating point numbers, each NaN."""
    table = pyarrow.table({"prompt": ["a", "b"], "system": [float("nan")] * 2, "score": [1.5, float("inf")]})
    found, changes = read(as_parquet(table, tmp_path / "rows.parquet"))
    assert found == [
        {"prompt": "a", "system": None, "score": 1.5},
        {"prompt": "b", "system": None, "score": float("inf")},
    ]
    assert changes == {"empty numbers": 2}


def test_line_ends_inside_cells_are_those_of_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b'prompt,completion\r\n"one\r\ntwo","three\rfour"\r\nplain,plain\r\n')
    found, changes = read(file)
    assert found == [
        {"prompt": "one\ntwo", "completion": "three\nfour"},
        {"prompt": "plain", "completion": "plain"},
    ]
    assert changes == {"line ends": 2}


WRITERS = [(as_parquet, ".parquet"), (as_arrow, ".arrow")]


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_column_that_appears_twice_is_refused(tmp_path: Path, write: Any, suffix: str) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    with pytest.raises(DataError, match="the column 'prompt' appears twice"):
        read(write(table, tmp_path / f"rows{suffix}"))


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_values_that_python_does_not_have_are_one_message(tmp_path: Path, write: Any, suffix: str) -> None:
    when = pyarrow.array([2**62], pyarrow.timestamp("us"))
    with pytest.raises(DataError, match="cannot be read as"):
        read(write(pyarrow.table({"when": when}), tmp_path / f"rows{suffix}"))


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_fields_of_an_object_that_appear_twice_are_refused(tmp_path: Path, write: Any, suffix: str) -> None:
    twice = pyarrow.StructArray.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["a", "a"])
    with pytest.raises(DataError, match="duplicate field names"):
        read(write(pyarrow.table({"messages": twice}), tmp_path / f"rows{suffix}"))
