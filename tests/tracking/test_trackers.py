import json
import threading
from pathlib import Path
from typing import Any

import pytest

from finetune.tracking import TrackerConfig, Trackers, figures, open_trackers
from finetune.tracking.trackers import TrackerError


class Broken:
    """A service that starts and then fails every call."""

    name, is_service = "broken", False

    def start(self, **_: Any) -> None:
        return

    def log(self, step: int, metrics: Any) -> None:
        raise TrackerError("gone")

    summary = artifact = log  # type: ignore[assignment]

    def finish(self) -> None:
        return


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "tracking" / "metrics.jsonl").read_text().splitlines()]


def test_json_lines_are_written_with_no_tracker_chosen(tmp_path: Path) -> None:
    trackers = open_trackers({}, run_name="a", folder=tmp_path, run_config={})
    trackers.log(1, {"train/loss": 2.0})
    trackers.summary({"eval/base/loss": 3.0})
    (tmp_path / "report.html").write_text("")
    trackers.artifact(tmp_path / "report.html", name="report", kind="report")
    trackers.finish()
    assert _lines(tmp_path) == [
        {"step": 1, "train/loss": 2.0},
        {"summary": {"eval/base/loss": 3.0}},
        {"artifact": "report", "kind": "report", "path": "report.html"},
    ]


def test_tracker_that_fails_is_reported_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    trackers = Trackers([Broken()])  # type: ignore[list-item]
    for step in range(3):
        trackers.log(step, {"train/loss": 1.0})
    trackers.finish()
    trackers.finish()
    printed = capsys.readouterr().out
    assert printed.count("the run continues without it") == 1
    assert printed.count("3 calls failed") == 1
    assert trackers.missed == {"broken": 3}


class Slow(Broken):
    """A service that waits for an event, and records its calls."""

    name, is_service = "slow", True

    def __init__(self) -> None:
        self.go, self.got = threading.Event(), []

    def start(self, **_: Any) -> None:
        self.got.append("start")

    def log(self, step: int, metrics: Any) -> None:
        assert self.go.wait(10)
        self.got.append(step)

    def finish(self) -> None:
        self.got.append(threading.current_thread().name)


def test_a_service_starts_with_its_first_figure_and_delays_no_step(tmp_path: Path) -> None:
    slow = Slow()
    trackers = Trackers([slow])  # type: ignore[list-item]
    trackers.start(run_name="a", run_config={}, folder=tmp_path)
    assert slow.got == []
    for step in range(3):
        trackers.log(step, {})
    assert len(slow.got) <= 1
    slow.go.set()
    trackers.finish()
    assert slow.got[:4] == ["start", 0, 1, 2]
    assert slow.got[4] != threading.current_thread().name


def test_a_service_that_cannot_start_gets_no_more_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Gone(Slow):
        name = "gone"

        def start(self, **_: Any) -> None:
            raise TrackerError("no route")

    gone = Gone()
    trackers = Trackers([gone])  # type: ignore[list-item]
    trackers.start(run_name="a", run_config={}, folder=tmp_path)
    trackers.log(1, {})
    trackers.finish()
    assert gone.got == []
    assert capsys.readouterr().out.count("no route; the run continues without it") == 1


def test_of_several_processes_only_the_first_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    trackers = open_trackers({}, run_name="a", folder=tmp_path, run_config={})
    trackers.log(1, {"train/loss": 2.0})
    trackers.finish()
    assert not list(tmp_path.iterdir())


def test_missing_tensorboard_package_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrackerConfig(kind="tensorboard", project="finetune", mode="offline")
    trackers = open_trackers({"tensorboard": config}, run_name="a", folder=tmp_path, run_config={})
    trackers.log(1, {"train/loss": 2.0})
    trackers.finish()
    assert _lines(tmp_path) == [{"step": 1, "train/loss": 2.0}]
    assert "tensorboard" in capsys.readouterr().out


def test_scores_are_filed_by_artifact_and_metric() -> None:
    product = {
        "artifacts": {"merged": {"loss": 0.1, "metrics": {"json_exact": {"value": 0.6, "low": 0.5, "high": 0.7}}}},
        "changes": {"tuning": {"loss": {"difference": -2.0, "low": -2.1, "high": -1.9}}},
        "rows": 160,
        "missed": [],
    }
    assert figures("eval", product) == {
        "eval/merged/loss": 0.1,
        "eval/merged/json_exact": 0.6,
        "eval/merged/json_exact_low": 0.5,
        "eval/merged/json_exact_high": 0.7,
        "eval/changes/tuning/loss": -2.0,
        "eval/changes/tuning/loss_low": -2.1,
        "eval/changes/tuning/loss_high": -1.9,
        "eval/rows": 160.0,
    }


def test_merge_candidates_are_filed_by_name() -> None:
    product = {
        "chosen": "original",
        "candidates": [{"name": "original", "kl": 0.2}, {"name": "dequantized", "kl": 0.0}],
    }
    assert figures("merge", product) == {"merge/original/kl": 0.2, "merge/dequantized/kl": 0.0}


def test_every_problem_of_a_tracker_is_named() -> None:
    problems = list(TrackerConfig(kind="slate", project=" ", mode="sometimes").problems())
    assert [problem.split()[0] for problem in problems] == [
        "tracking.slate.kind",
        "tracking.slate.mode",
        "tracking.slate.project",
    ]
