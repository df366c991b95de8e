"""More than 80 broken inputs. Each stops with a message that names the place, or is counted with its reason."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from finetune.data.limit_config import LimitConfig
from finetune.errors import DataError, ModelError
from finetune.products import PreparedData
from tests.data.helpers import ledger, pair
from tests.fixtures.models import make_tokenizer

GOOD = json.dumps(pair()).encode() + b"\n"
PAIRS = b"prompt,completion\n"


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def marked(user: Any, assistant: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "q", "train": user}, {"role": "assistant", "content": "a", "train": assistant}]
    return {"messages": [{name: value for name, value in turn.items() if value is not None} for turn in turns]}


def sharegpt(*turns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


def whole(chosen: list[Any], rejected: list[Any]) -> dict[str, Any]:
    return {"chosen": chat(*chosen)["messages"], "rejected": chat(*rejected)["messages"]}


def calls(arguments: Any, **changes: Any) -> dict[str, Any]:
    call = {"function": {"name": "f", "arguments": arguments}, **changes}
    return {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    }


USER, ANSWER = ("user", "q"), ("assistant", "a")
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty file": ("a.jsonl", b"", "contains no rows"),
    "blank lines only": ("a.jsonl", b"\n \n", "contains no rows"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16"),
    "UTF-16 CSV": ("a.csv", "prompt,completion\n".encode("utf-16-be").join([b"\xfe\xff", b""]), "is UTF-16"),
    "Latin-1 CSV": ("a.csv", PAIRS + "é,ü\n".encode("latin-1"), "not UTF-8"),
    "Latin-1 text": ("a.txt", "é\n".encode("latin-1"), "not UTF-8"),
    "Latin-1 JSON array": ("a.json", '[{"prompt": "é"}]'.encode("latin-1"), "not UTF-8"),
    "unknown kind": ("a.docx", b"PK", "unknown file type"),
    "no suffix": ("rows", GOOD, "unknown file type"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(GOOD * 500)[:-20], "damaged or truncated"),
    "gzip that is none": ("a.jsonl.gz", GOOD, "damaged or truncated"),
    "gzip with a wrong checksum": ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "damaged or truncated"),
    "gzip without its suffix": ("a.jsonl", gzip.compress(GOOD), "rename it to a.jsonl.gz"),
    "bz2 that is none": ("a.jsonl.bz2", GOOD, "cannot be read|damaged"),
    "bz2 cut off": ("a.jsonl.bz2", bz2.compress(GOOD * 500)[:-9], "damaged or truncated"),
    "xz that is none": ("a.jsonl.xz", GOOD, "damaged or truncated"),
    "xz cut off": ("a.jsonl.xz", lzma.compress(GOOD * 500)[:-9], "damaged or truncated"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "contains no rows"),
    "JSON array cut off": (
        "a.json",
        b'[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a',
        "a.json:3: not valid JSON",
    ),
    "JSON array with a missing comma": (
        "a.json",
        b'[{"prompt": "a", "completion": "b"}\n{"prompt": "c"}]',
        "a comma or ]",
    ),
    "JSON array with a comma at its end": (
        "a.json",
        b'[{"prompt": "a", "completion": "b"},\n]',
        "a.json:2: not valid JSON",
    ),
    "JSON array with something after it": (
        "a.json",
        b'[{"prompt": "a", "completion": "b"}]\n[]',
        "a.json:2: there is text after the end",
    ),
    "JSON array with a duplicate key": (
        "a.json",
        b'[{"prompt": "a", "prompt": "b", "completion": "c"}]',
        "'prompt' appears twice",
    ),
    "JSON array with NaN": ("a.json", b'[{"prompt": "a", "completion": NaN}]', "NaN is not a JSON value"),
    "JSON array without elements": ("a.json", b"[]", "contains no rows"),
    "JSON array nested too deeply": ("a.json", b'[{"prompt": ' + b"[" * 200_000, "element 1 is nested too deeply"),
    "JSON object nested too deeply": ("a.json", b'{"prompt": ' + b"[" * 200_000, "a.json: is nested too deeply"),
    "JSON object of rows with a duplicate key": (
        "a.json",
        b'{"data": [\n{"prompt": "a", "prompt": "b", "completion": "c"}]}',
        "'prompt' appears twice",
    ),
    "JSON object of rows with NaN": (
        "a.json",
        b'{"data": [\n{"prompt": "a", "completion": NaN}]}',
        "NaN is not a JSON value",
    ),
    "JSON that is a number": ("a.json", b"42", "neither a JSON array nor an object"),
    "JSON that is a string": ("a.json", b'"rows"', "neither a JSON array nor an object"),
    "JSON object without rows": (
        "a.json",
        b'{\n"name": "set",\n"version": 1}',
        "is one object with the keys name, version",
    ),
    "JSON object cut off": ("a.json", b'{\n"data": [{"prompt": "a"', "a.json:2: not valid JSON"),
    "JSON array of numbers": ("a.json", b"[1, 2]", "none of its first rows is an object"),
    "HTML error page": ("a.json", b"<!doctype html><p>404", "neither a JSON array nor an object"),
    "CSV with a stray quote": ("a.csv", PAIRS + b'"a" b,c\n', "a.csv:2: not valid CSV"),
    "CSV with an open quote": ("a.csv", PAIRS + b'"a,c\nd,e\n', "not valid CSV"),
    "CSV with semicolons": ("a.csv", b"prompt;completion\na;b\n", "cells are not separated by commas"),
    "CSV with a column twice": ("a.csv", b"prompt,prompt\na,b\n", "'prompt' appears twice"),
    "CSV with its header only": ("a.csv", PAIRS, "contains no rows"),
    "Parquet that is none": ("a.parquet", GOOD, "cannot be read as Parquet"),
    "Parquet cut off": ("a.parquet", b"PAR1\x00\x00", "cannot be read as Parquet"),
    "empty Parquet file": ("a.parquet", b"", "cannot be read as Parquet"),
    "Arrow that is none": ("a.arrow", GOOD, "cannot be read as Arrow"),
    "unknown columns": ("a.jsonl", b'{"foo": 1, "bar": 2}\n', "no known format has the columns bar, foo"),
    "two formats": (
        "a.jsonl",
        GOOD + b'{"instruction": "a", "output": "b"}\n',
        "look like alpaca and prompt_completion",
    ),
    "objects without columns": ("a.jsonl", b"{}\n{}\n", "none of its first rows is an object"),
    "text of spaces": ("a.txt", b"  \n\n \n", "contains no rows"),
}

ROWS: dict[str, tuple[str, Any, str]] = {
    "malformed JSON": ("prompt_completion", b'{"prompt": "a", "completion": ', "the line is not valid JSON"),
    "JSON with a trailing comma": (
        "prompt_completion",
        b'{"prompt": "a", "completion": "b",}',
        "the line is not valid JSON",
    ),
    "single quotes": ("prompt_completion", b"{'prompt': 'a', 'completion': 'b'}", "the line is not valid JSON"),
    "Latin-1 line": (
        "prompt_completion",
        '{"prompt": "é", "completion": "b"}'.encode("latin-1"),
        "the line is not UTF-8",
    ),
    "duplicate key": (
        "prompt_completion",
        b'{"prompt": "a", "prompt": "b", "completion": "c"}',
        "the line is not valid JSON",
    ),
    "NaN": ("prompt_completion", b'{"prompt": "a", "completion": NaN}', "the line is not valid JSON"),
    "Infinity": ("prompt_completion", b'{"prompt": "a", "completion": -Infinity}', "the line is not valid JSON"),
    "nested too deeply": ("prompt_completion", b'{"prompt": ' + b"[" * 200_000, "the line is not valid JSON"),
    "a list": ("prompt_completion", ["a", "b"], "the row is not an object"),
    "a string": ("prompt_completion", "a", "the row is not an object"),
    "null": ("prompt_completion", None, "the row is not an object"),
    "missing answer": ("prompt_completion", {"prompt": "a"}, "column 'completion' is missing"),
    "null answer": ("prompt_completion", pair(completion=None), "column 'completion' is null"),  # type: ignore[arg-type]
    "empty answer": ("prompt_completion", pair(completion=""), "the answer is empty"),
    "answer of spaces": ("prompt_completion", pair(completion=" \n\t"), "the answer is empty"),
    "empty prompt": ("prompt_completion", pair(prompt=""), "the prompt is empty"),
    "number for an answer": ("prompt_completion", {"prompt": "a", "completion": 7}, "column 'completion' is not text"),
    "object for an answer": (
        "prompt_completion",
        {"prompt": "a", "completion": {"a": 1}},
        "column 'completion' is not text",
    ),
    "half a character": ("prompt_completion", b'{"prompt": "a", "completion": "\\ud800 b"}', "half a character"),
    "ten megabytes": ("prompt_completion", pair(completion="word " * 2_000_000), "longer than max_tokens"),
    "alpaca without output": ("alpaca", {"instruction": "a", "input": ""}, "column 'output' is missing"),
    "alpaca with an empty instruction": (
        "alpaca",
        {"instruction": " ", "input": "", "output": "b"},
        "the instruction is empty",
    ),
    "alpaca with a broken history": (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["only one"]]},
        "an entry of 'history'",
    ),
    "no messages": ("messages", {"messages": []}, "there are no messages"),
    "messages as text": ("messages", {"messages": "hello"}, "'messages' is text that is not JSON"),
    "messages as a number": ("messages", {"messages": 3}, "'messages' is not a list"),
    "a message as text": ("messages", {"messages": ["hello"]}, "a message is not an object"),
    "a null message": ("messages", {"messages": [None]}, "a message is not an object"),
    "a message without role": ("messages", {"messages": [{"content": "a"}]}, "a message has no role"),
    "an unknown role": ("messages", chat(("narrator", "a"), ANSWER), "a message has an unknown role"),
    "a role that is a list": ("messages", chat((["user"], "a"), ANSWER), "a message has an unknown role"),
    "a message without content": ("messages", {"messages": [{"role": "user"}]}, "a message has no content"),
    "null content": ("messages", chat(("user", None), ANSWER), "a message has no content"),
    "content that is a number": ("messages", chat(("user", 3), ANSWER), "the content of a message is not text"),
    "an image": (
        "messages",
        chat(("user", [{"type": "image_url", "image_url": "x"}]), ANSWER),
        "something other than text",
    ),
    "two users in a row": ("messages", chat(USER, USER, ANSWER), "two user turns in a row"),
    "two assistants in a row": ("messages", chat(USER, ANSWER, ANSWER), "two assistant turns in a row"),
    "assistant first": ("messages", chat(ANSWER, USER, ANSWER), "the first turn is the assistant's"),
    "user last": ("messages", chat(USER, ANSWER, USER), "the last turn is not the assistant's"),
    "only a user": ("messages", chat(USER), "the last turn is not the assistant's"),
    "system in the middle": ("messages", chat(USER, ("system", "s"), ANSWER), "a system message follows other turns"),
    "tool result after a user": (
        "messages",
        chat(USER, ("tool", "r"), ANSWER),
        "a tool result follows no assistant turn",
    ),
    "nothing to train": ("messages", marked(None, False), "no turn is trained on"),
    "train that is a word": ("messages", marked("no", None), "neither true nor false"),
    "tool call without a name": ("messages", calls("{}", function={"arguments": "{}"}), "a tool call has no name"),
    "tool call with broken arguments": ("messages", calls('{"a": '), "the arguments of a tool call are not JSON"),
    "tool without a name": (
        "messages",
        {**chat(USER, ANSWER), "tools": [{"type": "function", "function": {}}]},
        "a tool has no name",
    ),
    "tools that are a number": ("messages", {**chat(USER, ANSWER), "tools": 5}, "column 'tools' is not a list"),
    "tools that the template ignores": (
        "messages",
        {**chat(USER, ANSWER), "tools": [{"name": "lookup"}]},
        "does not write the tools",
    ),
    "calls that the template ignores": ("messages", calls("{}"), "does not write tool calls"),
    "sharegpt with an unknown speaker": (
        "sharegpt",
        sharegpt(("alien", "q"), ("gpt", "a")),
        "a turn has an unknown speaker",
    ),
    "sharegpt without a value": ("sharegpt", {"conversations": [{"from": "human"}]}, "a turn has no 'value'"),
    "sharegpt with a null value": ("sharegpt", sharegpt(("human", None), ("gpt", "a")), "a turn has no 'value'"),
    "sharegpt with text for a turn": ("sharegpt", {"conversations": ["hi"]}, "a turn is not an object"),
    "sharegpt with a broken call": (
        "sharegpt",
        sharegpt(("human", "q"), ("function_call", "lookup(")),
        "a function call is not JSON",
    ),
    "guanaco without marks": ("guanaco", {"text": "just text"}, "no '### Human:'"),
    "guanaco with text before": ("guanaco", {"text": "hm\n### Human: q\n### Assistant: a"}, "there is text before"),
    "guanaco without an answer": ("guanaco", {"text": "### Human: q"}, "the last turn is not the assistant's"),
    "empty text": ("text", {"text": "  "}, "the text is empty"),
    "equal answers": ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
    "no rejected answer": ("preference", {"prompt": "q", "chosen": "a"}, "column 'rejected' is missing"),
    "empty rejected answer": (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": ""},
        "the rejected answer is empty",
    ),
    "conversations that differ early": (
        "preference",
        whole([USER, ANSWER], [("user", "p"), ANSWER]),
        "differ before the last turn",
    ),
    "label that is a number": ("unpaired", {**pair(), "label": 1}, "the label is neither true nor false"),
}


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(FILES) + len(ROWS) >= 80


@pytest.mark.parametrize("case", FILES)
def test_broken_file_stops_with_one_message(case: str, run: Callable[..., PreparedData], tmp_path: Path) -> None:
    name, content, message = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        run(path=str(tmp_path / name))
    assert name.split(".")[0] in str(caught.value)


LONG = b"word " * 250_000
TOO_LARGE: dict[str, tuple[str, bytes, str]] = {
    "a line of JSON": ("a.jsonl", GOOD + b'{"prompt": "' + LONG, "a line is longer than 1,048,576 bytes"),
    "a line of JSON in a .json": ("a.json", b'[{"prompt": "' + LONG * 5, "element 1 is longer than 1,048,576 char"),
    "a line of CSV": ("a.csv", PAIRS + LONG, "a line is longer than 1,048,576 bytes"),
    "a cell of many lines": ("a.csv", PAIRS + b'"' + LONG.replace(b" ", b"\n"), "field larger than field limit"),
    "a line of text": ("a.txt", LONG, "a line is longer than 1,048,576 bytes"),
    "a file of gzip": ("a.jsonl.gz", gzip.compress(b"\n" * 2**25), "decompresses to more than 10.0 times its size"),
    "a file of bzip2": ("a.txt.bz2", bz2.compress(b"word\n" * 2**23), "decompresses to more than 10.0 times its size"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_grows_beyond_a_limit_stops_with_the_limits_setting(
    case: str, run: Callable[..., PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.data.files.UNCHECKED_BYTES", 2**20)
    name, content, message = TOO_LARGE[case]
    (tmp_path / name).write_bytes(content)
    limits = LimitConfig(line_bytes=2**20, compression_ratio=10.0)
    with pytest.raises(DataError, match=message):
        run(path=str(tmp_path / name), text_unit="line", limits=limits)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pattern_of_the_tokenizer_that_never_ends_is_one_message(
    run: Callable[..., PreparedData], workers: int
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(ModelError, match=r"the tokenizer fails on a row .*retry-limit-in-match over.*; correct the"):
        run([pair("a" * 100 + "!")], with_tokenizer=tokenizer, workers=workers)


def broken(tmp_path: Path, row: Any) -> str:
    raw = row if isinstance(row, bytes) else json.dumps(row).encode()
    file = tmp_path / "rows.jsonl"
    good = {
        **pair(),
        **chat(USER, ("assistant", "fine")),
        **sharegpt(("human", "q"), ("gpt", "a")),
        "instruction": "i",
        "output": "o",
        "text": "### Human: q\n### Assistant: a",
        "chosen": "good",
        "rejected": "bad",
        "label": True,
    }
    good_row = json.dumps(good).encode()
    file.write_bytes(good_row + b"\n" + raw + b"\n")
    return str(file)


@pytest.mark.parametrize("case", ROWS)
def test_broken_row_stops_with_its_line_and_reason(case: str, run: Callable[..., PreparedData], tmp_path: Path) -> None:
    name, row, reason = ROWS[case]
    columns = {"preference": ["conversations", "messages"], "unpaired": ["messages", "conversations"]}
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{reason}"):
        run(path=broken_for(tmp_path, row, columns.get(name, [])), format=name, too_long="error")


@pytest.mark.parametrize("case", ROWS)
def test_broken_row_is_counted_and_explained_with_bad_rows_drop(
    case: str, run: Callable[..., PreparedData], tmp_path: Path
) -> None:
    name, row, reason = ROWS[case]
    columns = {"preference": ["conversations", "messages"], "unpaired": ["messages", "conversations"]}
    product = run(path=broken_for(tmp_path, row, columns.get(name, [])), format=name, bad_rows="drop")
    assert product.rows["in"] == 2
    assert product.rows["kept"] == 1
    (why,) = product.rows["dropped"]
    assert reason in why
    assert ledger(product)[1]["reason"] == why


def broken_for(tmp_path: Path, row: Any, without: list[str]) -> str:
    """Writes a file whose good first row has no column that would change the meaning of the broken one."""
    path = Path(broken(tmp_path, row))
    first, _, rest = path.read_bytes().partition(b"\n")
    kept = {name: value for name, value in json.loads(first).items() if name not in without}
    path.write_bytes(json.dumps(kept).encode() + b"\n" + rest)
    return str(path)


def test_missing_file_names_a_near_one(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        run(path=str(tmp_path / "trian.jsonl"))


def test_missing_folder_is_named(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither does the folder"):
        run(path=str(tmp_path / "no" / "rows.jsonl"))


def test_empty_folder_is_named(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no data file"):
        run(path=str(tmp_path / "empty"))


def test_glob_without_matches_is_named(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        run(path=str(tmp_path / "*.jsonl"))


def test_folder_instead_of_a_file_is_named(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match="contains no data file"):
        run(path=str(tmp_path / "a.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_named(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD)
    file.chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        run(path=str(file))


def test_unreachable_hub_is_an_error_with_a_remedy(run: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match=r"data.hub=nobody/nothing .* cannot be loaded: .*data.path"):
        run(hub="nobody/nothing")


def test_held_out_file_that_is_trained_on_too_is_refused(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match="is also a training file"):
        run(path=str(tmp_path / "a.jsonl"), heldout_path=str(tmp_path / "a.jsonl"))


def test_mapped_column_that_is_not_there_is_named(run: Callable[..., PreparedData]) -> None:
    with pytest.raises(
        DataError, match=r"data\.columns\.prompt: no column 'qestion' in rows.jsonl; it has prompt, completion"
    ):
        run([pair()], format="prompt_completion", columns={"prompt": "qestion"})


def test_csv_row_of_another_width_is_a_bad_row(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(PAIRS + b"a,b\nc\nd,e,f\n")
    product = run(path=str(tmp_path / "a.csv"), bad_rows="drop")
    assert product.rows["dropped"] == {"the row and the header have different numbers of cells": 2}


def test_parquet_with_numbers_for_text_is_a_bad_row(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": [1.5, 2.5]}), tmp_path / "a.parquet")
    message = r"a.parquet:1: column 'completion' is not text \(it is a number; write it as text\)"
    with pytest.raises(DataError, match=message):
        run(path=str(tmp_path / "a.parquet"))


def test_byte_order_mark_is_skipped(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert run(path=str(tmp_path / "a.jsonl")).rows["kept"] == 1


def test_only_bad_rows_leave_nothing_and_say_why(run: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match="no row is left to train on: the answer is empty: 3"):
        run([pair(completion="")] * 3, bad_rows="drop")
