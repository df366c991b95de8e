"""The same rows from any type of file give the same tokens; folders, globs and mixes are resolved."""

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data import DataConfig, SourceConfig
from finetune.data.sources import resolve_sources
from finetune.errors import DataError
from finetune.products import PreparedData
from tests.data.helpers import ledger, pair, split, write_jsonl

ROWS = [pair(f"What is {number}?", f'It is "{number}",\nindeed.') for number in range(6)]


def as_csv(file: Path, delimiter: str = ",") -> Path:
    with open(file, "w", newline="") as handle:
        writer = csv.DictWriter(handle, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return file


def as_arrow(file: Path) -> Path:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return file


def as_parquet(file: Path) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file


def as_gzip(file: Path) -> Path:
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    return file


def as_text(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


WRITERS: dict[str, Callable[[Path], Path]] = {
    "rows.jsonl": lambda file: write_jsonl(file, ROWS),
    "rows.jsonl.gz": as_gzip,
    "rows.json": lambda file: as_text(file, json.dumps(ROWS)),
    "indented.json": lambda file: as_text(file, json.dumps(ROWS, indent=2)),
    "wrapped.json": lambda file: as_text(file, json.dumps({"data": ROWS})),
    "lines.json": lambda file: write_jsonl(file, ROWS),
    "rows.csv": as_csv,
    "rows.tsv": lambda file: as_csv(file, "\t"),
    "rows.parquet": as_parquet,
    "rows.arrow": as_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_tokens(name: str, run: Callable[..., PreparedData], tmp_path: Path) -> None:
    product = run(path=str(WRITERS[name](tmp_path / name)))
    assert [row["input_ids"] for row in split(product, "train")] == [
        row["input_ids"] for row in split(run(ROWS), "train")
    ]


def test_json_array_is_read_in_blocks(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., PreparedData], tmp_path: Path
) -> None:
    monkeypatch.setattr("finetune.data.json_array.BLOCK_CHARACTERS", 7)
    product = run(path=str(as_text(tmp_path / "rows.json", json.dumps(ROWS, indent=1))))
    assert product.rows["kept"] == 6


def test_folder_is_read_by_split(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS[:4])
    write_jsonl(tmp_path / "set" / "test.jsonl", ROWS[4:])
    assert run(path=str(tmp_path / "set")).rows["in"] == 4


def test_glob_and_commas_name_several_files(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"part{number}.jsonl", ROWS[number : number + 1])
    write_jsonl(tmp_path / "more.jsonl", ROWS[4:5])
    product = run(path=f"{tmp_path}/part*.jsonl, {tmp_path}/more.jsonl")
    assert [row["source"] for row in ledger(product)] == ["part0.jsonl", "part1.jsonl", "part2.jsonl", "more.jsonl"]


def test_files_of_one_name_get_the_names_of_their_folders(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    write_jsonl(tmp_path / "a" / "x.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "b" / "x.jsonl", ROWS[1:2])
    product = run(path=f"{tmp_path}/a/x.jsonl,{tmp_path}/b/x.jsonl")
    assert [row["source"] for row in ledger(product)] == ["a/x.jsonl", "b/x.jsonl"]


def mixture(tmp_path: Path, **changes: Any) -> dict[str, SourceConfig]:
    write_jsonl(tmp_path / "many.jsonl", [pair(f"m {number}", "x") for number in range(30)])
    write_jsonl(tmp_path / "few.jsonl", [pair(f"f {number}", "y") for number in range(10)])
    return {
        name: SourceConfig(path=str(tmp_path / f"{name}.jsonl"), **changes.get(name, {})) for name in ("many", "few")
    }


def kept_by_source(product: PreparedData) -> dict[str, int]:
    kept = [row["source"] for row in ledger(product) if row["fate"] == "kept"]
    return {name: kept.count(name) for name in sorted(set(kept))}


def test_sources_are_mixed_by_weight(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    product = run(sources=mixture(tmp_path, many={"weight": 1.0}, few={"weight": 1.0}))
    assert kept_by_source(product) == {"few.jsonl": 10, "many.jsonl": 10}
    assert product.rows["dropped"] == {"not needed for the mix": 20}


def test_sources_are_mixed_by_count_and_the_mix_is_recorded(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    product = run(sources=mixture(tmp_path, many={"rows": 7}))
    assert kept_by_source(product) == {"few.jsonl": 10, "many.jsonl": 7}
    assert json.loads((product.folder / "rendering.json").read_text())["mix"] == {"many": 7, "few": 10}


def test_more_rows_than_a_source_has_is_refused(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.few\.rows=11 but only 10"):
        run(sources=mixture(tmp_path, few={"rows": 11}))


def test_limit_reads_the_first_rows(run: Callable[..., PreparedData]) -> None:
    assert run(ROWS, limit=4).rows["in"] == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets_are_read_whole_or_as_a_stream(
    streaming: bool, run: Callable[..., PreparedData], tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    product = run(hub=str(tmp_path / "set"), streaming=streaming, limit=4)
    assert product.rows["in"] == 4
    assert ledger(product)[0]["source"] == str(tmp_path / "set")


def test_folder_that_datasets_saved_is_read_without_its_notes(run: Callable[..., PreparedData], tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([pair(f"q{number}", f"a{number}") for number in range(5)])
    datasets.DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(str(tmp_path / "saved"))
    assert run(path=str(tmp_path / "saved")).rows["in"] == 5
    assert run(path=str(tmp_path / "saved" / "train")).rows["in"] == 5


def test_a_source_is_called_by_its_name_and_revision_and_no_folder_of_this_machine(
    make_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    for name in ("rows.jsonl", "held.jsonl"):
        write_jsonl(tmp_path / name, ROWS)
    sources = resolve_sources(make_config(path=str(tmp_path / "rows.jsonl"), heldout_path=str(tmp_path / "held.jsonl")))
    assert [source.title() for source in sources] == ["rows.jsonl", "held.jsonl (held out)"]
    assert resolve_sources(make_config(path=None, hub="org/name", revision="v2"))[0].title() == "org/name at v2"


@pytest.mark.parametrize("name", ["rows, final.jsonl", "rows[1].jsonl", "a*b.jsonl", "mine[2]/rows.jsonl"])
def test_path_that_exists_is_read_whatever_its_characters(
    make_config: Callable[..., DataConfig], tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    write_jsonl(file, ROWS)
    (tmp_path / "rows1.jsonl").write_text("not this one")
    assert [source.path for source in resolve_sources(make_config(path=str(file)))] == [file]
    assert file in [source.path for source in resolve_sources(make_config(path=str(file.parent / "*.jsonl")))]


@pytest.mark.parametrize("setting", ["path", "heldout_path"])
def test_pipes_and_devices_are_refused_at_once(
    make_config: Callable[..., DataConfig], tmp_path: Path, setting: str
) -> None:
    rows, pipe, device = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "pipe.jsonl", tmp_path / "zero.jsonl"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for endless in (pipe, device):
        with pytest.raises(DataError, match=rf"data\.{setting}: .*{endless.name} is a pipe or a device, which may"):
            resolve_sources(make_config(**{"path": str(rows), setting: str(endless)}))
