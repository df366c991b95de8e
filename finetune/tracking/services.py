"""MLflow, trackio, Comet and others: every service that accelerate has a tracker for, through one adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.console import log
from finetune.jsonable import flatten
from finetune.tracking.config import SENDS_FILES, TrackerConfig
from finetune.tracking.trackers import Figures, TrackerError


class Service:
    """Tracker that passes each call to accelerate's tracker of the same name.

    Keys and addresses are those of the service's own variables, e.g. MLFLOW_TRACKING_URI, COMET_API_KEY, TRACKIO_DIR.
    """

    is_service = True

    def __init__(self, config: TrackerConfig) -> None:
        self.config, self.name = config, config.kind

    def start(self, *, run_name: str, run_config: dict[str, Any], folder: Path) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        arguments = tracker_arguments(self.config, run_name=run_name, folder=folder)
        with self._errors():
            PartialState()  # accelerate's trackers ask it which process they are in
            self.tracker = LOGGER_TYPE_TO_CLASS[self.name](**arguments)
            self.tracker.start()
            self.tracker.store_init_configuration({name: _plain(value) for name, value in flatten(run_config).items()})
        log("tracking", f"{self.name}: project {self.config.project}, run {run_name}")

    def log(self, step: int, metrics: Figures) -> None:
        with self._errors():
            self.tracker.log(dict(metrics), step=step)

    def summary(self, metrics: Figures) -> None:
        with self._errors():
            self.tracker.log({f"summary/{name}": value for name, value in metrics.items()})

    def artifact(self, path: Path, *, name: str, kind: str) -> None:
        if not self.config.artifacts or self.name not in SENDS_FILES:
            return
        with self._errors():
            if path.is_dir():
                self.tracker.log_artifacts(str(path), artifact_path=name)
            else:
                self.tracker.log_artifact(str(path), artifact_path=name)

    def finish(self) -> None:
        with self._errors():
            self.tracker.finish()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns whatever the service's package raises into `TrackerError`: each package has exceptions of its own."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise TrackerError(f"the service refuses the call ({lines[0]})") from error


def tracker_arguments(config: TrackerConfig, *, run_name: str, folder: Path) -> dict[str, Any]:
    """Returns the arguments of accelerate's tracker: each service names project and run in its own words."""
    project = config.project
    arguments: dict[str, dict[str, Any]] = {
        "mlflow": {"experiment_name": project, "run_name": run_name},
        "trackio": {"run_name": project, "name": run_name},
        "comet_ml": {"run_name": project},
        "clearml": {"project_name": project, "task_name": run_name},
        "swanlab": {"run_name": project, "experiment_name": run_name, "logdir": str(folder / "swanlab")},
        "aim": {"run_name": run_name, "logging_dir": str(folder), "experiment": project},
        "dvclive": {"dir": str(folder / "dvclive")},
    }
    return arguments[config.kind]


def _plain(value: Any) -> bool | int | float | str:
    """Returns a value as the services take it: numbers and text; lists and null become JSON."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
