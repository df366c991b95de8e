"""The check of a GPU works before there is one: at a tiny size, on a CPU, every stage of it."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu import check
from finetune import hardware


def test_without_a_gpu_it_measures_nothing_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = hardware.Machine(cores=2, ram_bytes=0, disk_free_bytes=0, gpu_obstacle="this machine has AMD GPUs (gfx1)")
    monkeypatch.setattr(hardware, "probe", lambda: nothing)
    assert check.main([]) == 2
    assert "check-gpu: this machine has AMD GPUs (gfx1); nothing was measured" in capsys.readouterr().out


def test_a_stage_that_fails_is_a_result() -> None:
    def fail() -> dict[str, int]:
        raise ValueError("exit code 1: no such file")

    assert check.timed(fail)["error"] == "ValueError: exit code 1: no such file"
    assert check.timed(lambda: {"parameters": 3})["parameters"] == 3


@pytest.mark.slow
def test_the_whole_check_runs_at_a_tiny_size_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = check.main([str(tmp_path / "check.json"), "--tiny"])
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["failed"] == [], json.dumps(printed["stages"], indent=1)
    assert code == 0
    assert printed == json.loads((tmp_path / "check.json").read_text())
    assert printed["device"] == "cpu"
    assert printed["ratio_trl"] > 0
    assert printed["planned_bytes"] > 0
    assert printed["stages"]["ours"]["merge_seconds"] > 0
    assert abs(printed["loss_difference"]) < 1  # both start at the same random base, and take four steps
