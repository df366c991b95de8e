import inspect
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from finetune.config import load
from finetune.errors import ConfigError
from finetune.tracking import TrackerConfig, open_trackers
from finetune.tracking.config import KINDS, SERVICES, check_trackers
from finetune.tracking.services import tracker_arguments

CONFIG = {"lora": {"rank": 8, "targets": ["all-linear"]}, "train": {"steps": None}}


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where trackio keeps its projects: it reads the variable when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


def test_every_tracker_of_accelerate_can_be_chosen() -> None:
    assert set(LOGGER_TYPE_TO_CLASS) == set(KINDS)
    options = Path(__file__).parents[2] / "conf" / "tracking"
    assert {file.stem for file in options.iterdir()} == set(KINDS)


@pytest.mark.parametrize("kind", SERVICES)
def test_accelerates_tracker_takes_the_arguments_that_it_is_given(kind: str, tmp_path: Path) -> None:
    config = TrackerConfig(kind=kind, project="finetune", mode="auto")
    arguments = tracker_arguments(config, run_name="a", folder=tmp_path)
    inspect.signature(LOGGER_TYPE_TO_CLASS[kind].__init__).bind(None, **arguments)
    assert not list(config.problems())


def test_trackio_has_config_and_figures_of_a_run(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrackerConfig(kind="trackio", project="jsons", mode="auto")
    trackers = open_trackers({"trackio": config}, run_name="first", folder=tmp_path / "run", run_config=CONFIG)
    for step, loss in ((1, 2.0), (2, 1.5)):
        trackers.log(step, {"train/loss": loss})
    trackers.summary({"eval/merged/loss": 1.25})
    trackers.artifact(tmp_path, name="adapter", kind="model")
    trackers.finish()
    assert trackers.missed == {}
    assert "trackio: project jsons, run first" in capsys.readouterr().out
    with sqlite3.connect(store / "jsons.db") as base:
        logged = [json.loads(text) for (text,) in base.execute("select metrics from metrics order by rowid")]
        (stored,) = base.execute("select config from configs").fetchone()
    assert [entry.get("train/loss") for entry in logged] == [2.0, 1.5, None]
    assert logged[-1]["summary/eval/merged/loss"] == 1.25
    sent = json.loads(stored)
    assert (sent["lora.rank"], sent["lora.targets"], sent["train.steps"]) == (8, '["all-linear"]', "null")


def test_service_that_refuses_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setattr("trackio.init", refuse)
    config = TrackerConfig(kind="trackio", project="jsons", mode="auto")
    trackers = open_trackers({"trackio": config}, run_name="first", folder=tmp_path, run_config=CONFIG)
    trackers.log(1, {"train/loss": 2.0})
    trackers.finish()
    assert trackers.missed == {"trackio": 1}
    assert "the service refuses the call (no such host); the run continues without it" in " ".join(
        capsys.readouterr().out.split()
    )


def test_package_that_is_not_installed_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.tracking.config.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"tracking\.mlflow needs the package mlflow, .* pip install mlflow, or leave"
    ):
        check_trackers(load(["+experiment=quickstart", "tracking=[mlflow]"]).tracking)


def test_settings_that_a_service_does_not_read_are_named() -> None:
    with_files, figures_only = (TrackerConfig(kind=kind, project="a", mode="auto") for kind in ("mlflow", "trackio"))
    assert [name for name, _ in with_files.unused()] == ["mode", "entity", "group", "tags"]
    assert [name for name, _ in figures_only.unused()] == ["mode", "entity", "group", "tags", "artifacts"]
