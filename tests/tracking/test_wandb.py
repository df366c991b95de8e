import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.tracking import TrackerConfig, Trackers, open_trackers
from finetune.tracking.wandb import choose_mode
from tests.tracking.wandb_file import records

CANARY = "canary0123456789canary0123456789canary01"
RUN_CONFIG = {"lora": {"rank": 16, "alpha": 32.0}, "model": {"name": "tiny"}}


def _open(folder: Path, mode: str = "auto") -> Trackers:
    config = TrackerConfig(kind="wandb", project="finetune", mode=mode)
    return open_trackers({"wandb": config}, run_name="quick start", folder=folder, run_config=RUN_CONFIG)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after an offline run with a resumption, and secrets in the environment."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY"):
            patch.setenv(name, CANARY)
        patch.setenv("WANDB_MODE", "offline")
        for first in (1, 3):
            trackers = _open(folder)
            for step in (first, first + 1):
                trackers.log(step, {"train/loss": 1.0 / step, "train/learning_rate": 1e-3})
            trackers.finish()
            time.sleep(1.1)  # W&B names a run's folder by the second
        trackers = _open(folder)
        trackers.summary({"eval/merged/json_exact": 0.64})
        (folder / "report.html").write_text("<p>report</p>")
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")
        trackers.artifact(folder / "report.html", name="report", kind="report")
        trackers.artifact(folder / "adapter", name="adapter", kind="model")
        trackers.finish()
    return folder


@pytest.fixture(scope="module")
def written(tracked: Path) -> list[Any]:
    return [record for file in sorted(tracked.rglob("*.wandb")) for record in records(file)]


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_run_file_holds_the_configuration(written: list[Any]) -> None:
    config = next(_values(record.run.config.update) for record in written if record.WhichOneof("record_type") == "run")
    assert config["lora"] == RUN_CONFIG["lora"]
    assert config["model"] == RUN_CONFIG["model"]


def test_run_file_holds_every_logged_figure_with_its_step(written: list[Any]) -> None:
    lines = [_values(record.history.item) for record in written if record.WhichOneof("record_type") == "history"]
    assert {line["step"]: line["train/loss"] for line in lines} == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3), 4: 0.25}


def test_run_file_holds_the_summary(written: list[Any]) -> None:
    summaries: dict[str, Any] = {}
    for record in written:
        if record.WhichOneof("record_type") == "summary":
            summaries |= _values(record.summary.update)
    assert summaries["eval/merged/json_exact"] == 0.64


def test_report_and_adapter_go_out_as_artifacts(written: list[Any]) -> None:
    sent = {record.request.log_artifact.artifact.name or record.artifact.name for record in written}
    assert {"quick-start-report", "quick-start-adapter"} <= sent


def test_resumed_run_continues_under_the_same_id(tracked: Path, written: list[Any]) -> None:
    identity = json.loads((tracked / "tracking" / "wandb.json").read_text())["id"]
    assert identity.startswith("quick-start-")
    assert {record.run.run_id for record in written if record.WhichOneof("record_type") == "run"} == {identity}


def test_no_secret_of_the_environment_reaches_any_file(tracked: Path) -> None:
    files = [file for file in tracked.rglob("*") if file.is_file()]
    assert len(files) > 4
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]


def test_run_file_names_neither_host_nor_program_nor_git_remote(written: list[Any]) -> None:
    runs = [record.run for record in written if record.WhichOneof("record_type") == "run"]
    assert not any(run.host or run.git.remote_url for run in runs)
    assert not [record for record in written if record.WhichOneof("record_type") in ("output", "output_raw")]


@pytest.mark.parametrize(
    ("wish", "surroundings", "mode"),
    [
        ("auto", {}, "off"),
        ("auto", {"WANDB_MODE": "disabled"}, "off"),
        ("auto", {"WANDB_API_KEY": "0" * 40}, "online"),
        ("auto", {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, "offline"),
        ("offline", {"WANDB_API_KEY": "0" * 40}, "offline"),
        ("online", {"WANDB_API_KEY": "0" * 40}, "online"),
        ("online", {}, "offline"),
    ],
)
def test_it_goes_online_only_with_a_key(
    wish: str, surroundings: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    assert choose_mode(wish)[0] == mode


def test_somebody_who_is_logged_in_goes_online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password " + "0" * 40 + "\n")
    (tmp_path / "netrc").chmod(0o600)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode("auto") == ("online", "this user is logged in to wandb.example.org")


def test_server_that_cannot_be_reached_makes_the_run_offline_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    trackers = _open(tmp_path)
    trackers.log(1, {"train/loss": 1.0})
    trackers.finish()
    assert "offline, because http://127.0.0.1:9 cannot be reached" in " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.rglob("*.wandb"))
    assert trackers.missed == {}


def test_importing_the_package_imports_no_tracker() -> None:
    code = "import sys, finetune.tracking; assert not {'wandb', 'torch', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
