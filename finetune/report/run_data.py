"""Everything that a run folder tells, read once; what is not there is empty."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import ConfigError, DataError
from finetune.run import STAGES

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the stages of one run left behind.

    Attributes:
        run: The run folder.
        config: config.yaml, composed and resolved.
        command: How the run was started.
        environment: environment.json: versions, commit, machine, placement.
        manifests: Each finished stage's manifest, by stage, in the order of the line.
        metrics: Lines of train/metrics.jsonl.
        memory: Lines of memory.jsonl.
        samples: Lines of eval/samples.jsonl.
    """

    run: Path
    config: Fields
    command: str
    environment: Fields
    manifests: dict[str, Fields]
    metrics: list[Fields]
    memory: list[Fields]
    samples: list[Fields]

    def product(self, stage: str) -> Fields | None:
        """What a stage made, or None where it has not finished."""
        return self.manifests[stage]["product"] if stage in self.manifests else None


def gather(run: Path) -> Facts:
    """Reads a run folder.

    Raises:
        ConfigError: There is no such folder, or no run in it.
        DataError: A file is damaged.
    """
    if not run.is_dir():
        raise ConfigError(f"run.name: there is no run in {run}; give run.name (and run.root) of a run that was started")
    manifests = {stage: found for stage in STAGES if (found := _manifest(run, stage)) is not None}
    config = run / "config.yaml"
    if not manifests and not config.is_file():
        raise ConfigError(
            f"run.name: {run} holds neither config.yaml nor a finished stage, so there is nothing to report"
        )
    command = run / "command.txt"
    environment = run / "environment.json"
    return Facts(
        run=run,
        config=_yaml(config),
        command=command.read_text(encoding="utf-8").strip() if command.is_file() else "",
        environment=_json(environment) if environment.is_file() else {},
        manifests=manifests,
        metrics=_lines(run / "train" / "metrics.jsonl"),
        memory=_lines(run / "memory.jsonl"),
        samples=_lines(run / "eval" / "samples.jsonl"),
    )


def _manifest(run: Path, stage: str) -> Fields | None:
    file = run / stage / "manifest.json"
    if file.is_file():
        return _json(file)
    alone = run / f"{stage}.json"
    if stage == "plan" and alone.is_file():
        return {"stage": stage, "product": _json(alone)}
    return None


def _json(file: Path) -> Fields:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is damaged ({error}); delete it and run the stage that wrote it again") from error


def _yaml(file: Path) -> Fields:
    if not file.is_file():
        return {}
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise DataError(f"{file} is damaged ({error}); run again with run.if_exists=resume to write it anew") from error


def _lines(file: Path) -> list[Fields]:
    """A JSON Lines file; a last line cut short by a killed process is left out."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    read = []
    for number, line in enumerate(lines, start=1):
        try:
            read.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(
                    f"{file}:{number} is not JSON ({error}); delete the line to go on without it"
                ) from error
    return read
