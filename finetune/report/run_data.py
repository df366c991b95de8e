"""Reads a run folder once; what is missing is empty."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import ConfigError, DataError
from finetune.files import read_json
from finetune.run import STAGES

Fields = dict[str, Any]
"""A JSON object."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What the stages of one run left in its folder.

    Attributes:
        run: The run folder.
        config: config.yaml, composed and resolved.
        command: How the run was started.
        environment: environment.json: versions, commit, machine, placement.
        manifests: The manifest of each finished stage, in the order of the pipeline.
        metrics: Lines of train/metrics.jsonl.
        memory: Lines of memory.jsonl.
        samples: Lines of eval/samples.jsonl.
        answers: Lines of train/samples.jsonl: answers that training sampled; the later one where a step is repeated.
        examples: data/examples.json: documents with the text that is trained on.
    """

    run: Path
    config: Fields
    command: str
    environment: Fields
    manifests: dict[str, Fields]
    metrics: list[Fields]
    memory: list[Fields]
    samples: list[Fields]
    answers: list[Fields] = field(default_factory=list)
    examples: list[Fields] = field(default_factory=list)

    def product(self, stage: str) -> Fields | None:
        """Returns what a stage made, or None where it has not finished."""
        return self.manifests[stage]["product"] if stage in self.manifests else None


def read_run(run: Path) -> RunData:
    """Reads a run folder.

    Raises:
        ConfigError: There is no such folder, or no run in it.
        DataError: A file is damaged.
    """
    if not run.is_dir():
        raise ConfigError(f"run.name: there is no run in {run}; give run.name (and run.root) of a run that was started")
    manifests = {stage: manifest for stage in STAGES if (manifest := _manifest(run, stage)) is not None}
    config, command, environment = run / "config.yaml", run / "command.txt", run / "environment.json"
    examples = run / "data" / "examples.json"
    if not manifests and not config.is_file():
        raise ConfigError(
            f"run.name: {run} holds neither config.yaml nor a finished stage, so there is nothing to report"
        )
    return RunData(
        run=run,
        config=_read_yaml(config),
        command=command.read_text(encoding="utf-8").strip() if command.is_file() else "",
        environment=read_json(environment, dict) if environment.is_file() else {},
        manifests=manifests,
        metrics=_read_json_lines(run / "train" / "metrics.jsonl"),
        memory=_read_json_lines(run / "memory.jsonl"),
        samples=_read_json_lines(run / "eval" / "samples.jsonl"),
        answers=_latest(_read_json_lines(run / "train" / "samples.jsonl")),
        examples=read_json(examples, list) if examples.is_file() else [],
    )


def _latest(answers: list[Fields]) -> list[Fields]:
    """Returns one line for each answer of a step: a resumed run may have sampled it again."""
    return list({(answer["step"], answer["row"], answer["number"]): answer for answer in answers}.values())


def _manifest(run: Path, stage: str) -> Fields | None:
    file = run / stage / "manifest.json"
    if file.is_file():
        return read_json(file, dict)
    single_file = run / f"{stage}.json"
    if stage == "plan" and single_file.is_file():
        return {"stage": stage, "product": read_json(single_file, dict)}
    return None


def _read_yaml(file: Path) -> Fields:
    if not file.is_file():
        return {}
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise DataError(f"{file} is damaged ({error}); run again with run.if_exists=resume to rewrite it") from error


def _read_json_lines(file: Path) -> list[Fields]:
    """Reads a JSON Lines file; an incomplete last line, left by a killed process, is ignored."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(
                    f"{file}:{number} is not JSON ({error}); delete the line to continue without it"
                ) from error
    return rows
