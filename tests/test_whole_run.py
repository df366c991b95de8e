"""One whole tiny run in processes of its own, as a user would start it: what it leaves, and what is done with it."""

import json
import shutil
from pathlib import Path

import pytest

from finetune.cli import main
from tests.fixtures.little_disk import on_little_disk
from tests.fixtures.tiny_run import CANARIES, TinyRun, asked
from tests.provenance.read_tracking import UNREAD


@pytest.fixture
def finished(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    assert tiny_run.code == 0, tiny_run.said
    return shutil.copytree(tiny_run.folder, tmp_path / "outputs" / "tiny")


def test_the_whole_line_leaves_what_the_contract_promises(tiny_run: TinyRun) -> None:
    assert tiny_run.code == 0, tiny_run.said
    run = tiny_run.folder
    report = json.loads((run / "report.json").read_text())
    assert (report["schema"], report["status"], report["run"], report["seed"]) == (1, "complete", "tiny", 1)
    rows = report["data"]["rows"]
    assert rows["in"] == rows["kept"] + rows["duplicate"] + sum(rows["dropped"].values()) == 52
    assert report["model"]["quantization"]["method"] == "nf4"
    assert report["train"]["optimizer"]["asked"] == "paged_adamw_8bit"
    assert set(report["eval"]["artifacts"]) == {"base", "base_quantized", "adapter", "merged"}
    candidates = {candidate["name"]: candidate for candidate in report["merge"]["candidates"]}
    assert set(candidates) == {"dequantized", "original"}
    measured = report["eval"]["artifacts"]
    assert report["merge"]["reference"]["loss"] == pytest.approx(measured["adapter"]["loss"], abs=1e-9)
    assert candidates[report["merge"]["chosen"]]["loss"] == pytest.approx(measured["merged"]["loss"], abs=1e-9)
    for export in report["export"][:3]:
        assert export["parity"]["tokens"] == measured["merged"]["tokens"]
    assert report["export"][2]["parity"]["answers"]["rows"] == 4
    assert {export["format"] for export in report["export"]} == {"adapter", "safetensors", "gguf", "card"}
    assert all(
        report["stages"][stage]["peak_rss_bytes"] > 0 for stage in ("data", "model", "train", "merge", "eval", "export")
    )
    assert "<svg" in (run / "report.html").read_text()


def test_a_finished_run_is_kept_resumed_and_merged_again(
    tiny_run: TinyRun, tiny_base: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*asked(tiny_run.home, tiny_base), f"run.root={finished.parent}"]
    assert main(again) == 2
    assert "nothing is written over it" in capsys.readouterr().err
    assert main([*again, "run.if_exists=resume"]) == 0
    assert capsys.readouterr().out.count("done before") == 6
    assert main([*again, "run.if_exists=resume", "lora.rank=8"]) == 2
    assert main(["merge", f"run.root={finished.parent}", "run.name=tiny", "merge.choose=original"]) == 0
    assert json.loads((finished / "merge" / "manifest.json").read_text())["product"]["chosen"] == "original"


@pytest.mark.parametrize("stage", ["train", "merge", "eval", "export", "report"])
def test_a_stage_on_a_full_disk_is_one_message(stage: str, finished: Path) -> None:
    (finished / "memory.jsonl").unlink()
    words = [stage, "run.name=tiny", f"run.root={finished.parent}", "tracking=[]"]
    code, output = on_little_disk(30_000, words)
    assert (code, output.count("finetune: "), "Traceback" in output) == (1, 1, False), output
    message = output.partition("finetune: ")[2]
    assert message.startswith(str(finished))
    assert "File too large; files may only be that large here: raise the limit" in message


def test_a_whole_run_leaves_no_setting_unread(tiny_run: TinyRun) -> None:
    assert tiny_run.code == 0, tiny_run.said
    assert f"{UNREAD} []" in tiny_run.said


def holders(folder: Path, canary: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and canary.encode() in file.read_bytes()]


def test_the_search_finds_a_planted_canary(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "log").write_bytes(b"\x00before" + CANARIES["HF_TOKEN"].encode() + b"after\xff")
    assert holders(tmp_path, CANARIES["HF_TOKEN"]) == [tmp_path / "a" / "b" / "log"]


@pytest.mark.parametrize("name", CANARIES)
def test_a_secret_of_the_environment_is_in_no_byte_that_a_run_writes(tiny_run: TinyRun, name: str) -> None:
    assert tiny_run.code == 0, tiny_run.said
    assert CANARIES[name] not in tiny_run.said
    assert list((tiny_run.folder / "tracking" / "wandb").glob("offline-run-*/*.wandb")), "W&B has written its file"
    assert holders(tiny_run.home, CANARIES[name]) == []
