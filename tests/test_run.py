"""The run folder: manifests last, nothing done twice, nothing written over."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.cli.settings import saved_overrides
from finetune.errors import ConfigError, DamagedProduct
from finetune.run import RunFolder, RunSettings, write_json


@dataclass(kw_only=True, slots=True)
class StageConfig:
    size: int


@dataclass(frozen=True, kw_only=True)
class Thing:
    folder: Path
    size: int


def stage(folder: RunFolder, size: int, *, calls: list[int] | None = None) -> Thing:
    """Runs the stage ``thing``, whose product is its size."""

    def make(out: Path) -> Thing:
        if calls is not None:
            calls.append(size)
        (out / "thing.txt").write_text(str(size))
        return Thing(folder=out, size=size)

    return folder.stage("thing", Thing, make, key={"thing": StageConfig(size=size)})


def fail(folder: RunFolder, size: int) -> Thing:
    def make(out: Path) -> Thing:
        (out / "half.txt").write_text("half")
        raise RuntimeError("stopped half way")

    return folder.stage("thing", Thing, make, key={"thing": StageConfig(size=size)})


def settings(root: Path, if_exists: str = "fail") -> RunSettings:
    return RunSettings(name="r", root=str(root), seed=1, if_exists=if_exists)


def test_stage_runs_once_and_is_read_back_from_its_manifest(tmp_path: Path) -> None:
    folder, calls = RunFolder.open(settings(tmp_path)), []
    first = stage(folder, 3, calls=calls)
    second = stage(folder, 3, calls=calls)
    assert first == second == Thing(folder=tmp_path / "r" / "thing", size=3)
    assert calls == [3]
    manifest = json.loads((tmp_path / "r" / "thing" / "manifest.json").read_text())
    assert manifest["product"] == {"size": 3}
    assert manifest["peak_rss_bytes"] > 0


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    file: Path | None


@dataclass(frozen=True, kw_only=True)
class Assembly:
    folder: Path
    parts: list[Part]
    by_name: dict[str, Part]


def test_product_of_nested_dataclasses_is_read_back_as_it_was(tmp_path: Path) -> None:
    folder, parts = RunFolder.open(settings(tmp_path)), [Part(name="a", file=Path("a.txt")), Part(name="b", file=None)]
    written = folder.stage(
        "parts", Assembly, lambda out: Assembly(folder=out, parts=parts, by_name={"b": parts[1]}), key={}
    )
    assert folder.product("parts", Assembly) == written
    manifest = json.loads((tmp_path / "r" / "parts" / "manifest.json").read_text())
    assert manifest["product"]["parts"] == [{"name": "a", "file": "a.txt"}, {"name": "b", "file": None}]


def test_a_pipe_in_place_of_the_lock_ends_at_once(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path))
    os.mkfifo(folder.path / ".lock")
    with pytest.raises(OSError, match="No such device or address"), folder.lock():
        pass


@pytest.mark.parametrize("content", ["", '{"schema": 3, "key', "[1]", "\0" * 40], ids=["empty", "cut", "list", "NUL"])
def test_a_manifest_that_a_power_cut_damaged_is_named_with_the_remedy(content: str, tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path))
    stage(folder, 3)
    file = tmp_path / "r" / "thing" / "manifest.json"
    file.write_text(content)
    with pytest.raises(DamagedProduct, match=r"thing/manifest\.json is damaged \(.*; delete it and run the stage that"):
        stage(folder, 3)
    file.unlink()
    assert stage(folder, 3).size == 3


@pytest.mark.parametrize("content", ["", '["+experiment=qui', "{}"])
def test_what_was_typed_is_named_where_it_cannot_be_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "overrides.json").write_text(content)
    with pytest.raises(DamagedProduct, match=r"overrides\.json is damaged .*; give all settings of the run again"):
        saved_overrides([f"run.root={tmp_path}", "run.name=r"])


def test_stage_that_failed_leaves_no_manifest_and_runs_again(tmp_path: Path) -> None:
    folder, calls = RunFolder.open(settings(tmp_path)), []
    with pytest.raises(RuntimeError):
        fail(folder, 3)
    assert folder.manifest("thing") is None
    stage(folder, 3, calls=calls)
    assert calls == [3]


def test_changed_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path))
    stage(folder, 3)
    with pytest.raises(ConfigError, match=r"thing.size was 3 and is 4"):
        stage(folder, 4)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_changed_file_of_a_finished_stage_stops_the_next_one_with_both_hashes(tmp_path: Path, damage: str) -> None:
    """Size and modification time are those of before, as on a disk that rots."""
    stage(RunFolder.open(settings(tmp_path)), 3)
    file = tmp_path / "r" / "thing" / "thing.txt"
    times = file.stat()
    if damage == "flipped":
        file.write_text("4")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        file.unlink()
    folder, made = RunFolder.open(settings(tmp_path, "resume")), []
    stage(folder, 3)
    with pytest.raises(DamagedProduct, match=r"thing\.txt .*SHA-256 was 4e07408562be.* and is (4b227777d4dd|missing)"):
        folder.stage("next", Thing, lambda out: made.append(1) or Thing(folder=out, size=1), key={})
    assert not made


def test_refusal_names_every_entry_that_changed_with_both_values(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path))
    folder.stage(
        "thing", Thing, lambda out: Thing(folder=out, size=1), key={"lora": {"rank": 8, "alpha": 16}, "seed": 1}
    )
    with pytest.raises(ConfigError, match=r"\(lora.rank was 8 and is 4; seed was 1 and is 2\)"):
        folder.stage(
            "thing", Thing, lambda out: Thing(folder=out, size=1), key={"lora": {"rank": 4, "alpha": 16}, "seed": 2}
        )


def test_manifest_of_another_version_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path))
    stage(folder, 3)
    file = tmp_path / "r" / "thing" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 1, "key": "0" * 64}))
    with pytest.raises(
        ConfigError, match=r"written by another version of finetune \(manifest schema 1, this one reads 3\)"
    ):
        stage(folder, 3)


def test_stage_asked_for_again_replaces_the_old_one_only_when_done(tmp_path: Path) -> None:
    stage(RunFolder.open(settings(tmp_path)), 3)
    again = RunFolder.open(settings(tmp_path, "resume"), redo=frozenset({"thing"}))
    with pytest.raises(RuntimeError):
        fail(again, 4)
    assert (tmp_path / "r" / "thing" / "thing.txt").read_text() == "3"
    assert stage(again, 4).size == 4
    assert (tmp_path / "r" / "thing" / "thing.txt").read_text() == "4"
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["memory.jsonl", "thing"]


@pytest.mark.parametrize(("killed_at", "stands"), [("second rename", "3"), ("deletion", "4")])
def test_a_kill_while_products_change_places_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str, stands: str
) -> None:
    stage(RunFolder.open(settings(tmp_path)), 3)
    again = RunFolder.open(settings(tmp_path, "resume"), redo=frozenset({"thing"}))

    def killed(path: Path, target: Path | None = None) -> None:
        if target is None or path.name == ".thing.new":
            raise KeyboardInterrupt
        path.rename(target)

    with monkeypatch.context() as moment:
        moment.setattr("finetune.run.shutil.rmtree" if killed_at == "deletion" else "finetune.run.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            stage(again, 4)
    with again.lock():
        assert (tmp_path / "r" / "thing" / "thing.txt").read_text() == stands
        assert not list((tmp_path / "r").glob(".thing.old"))
        assert stage(again, 5).size == 5


def test_existing_run_is_not_written_over_unless_asked(tmp_path: Path) -> None:
    stage(RunFolder.open(settings(tmp_path)), 3)
    with pytest.raises(ConfigError, match="holds a run already and nothing is written over it"):
        RunFolder.open(settings(tmp_path))
    assert RunFolder.open(settings(tmp_path, "resume")).manifest("thing") is not None
    assert RunFolder.open(settings(tmp_path, "overwrite")).manifest("thing") is None


def test_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 5))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"a run needs .* of disk space in .* and 5 B are free"):
        RunFolder.open(settings(tmp_path))


def hold(path: Path) -> None:
    with RunFolder(path).lock():
        (path / "held").touch()
        time.sleep(60)


def test_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path))
    holder = multiprocessing.get_context("spawn").Process(target=hold, args=(folder.path,))
    holder.start()
    while not (folder.path / "held").exists():
        time.sleep(0.05)
    with pytest.raises(ConfigError, match="another process works in"), folder.lock():
        pass
    with pytest.raises(ConfigError, match="another process works in"):
        RunFolder.open(settings(tmp_path, "overwrite"))
    assert (folder.path / "held").exists()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with folder.lock():
        assert True


def test_json_is_replaced_in_one_move(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
