"""Settings that a command takes from a run that exists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.errors import ConfigError
from finetune.files import read_json


def saved_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns what the run of ``run.name`` was started with, so that a later command composes the same.

    Raises:
        DamagedProduct: What was typed cannot be read.
        ConfigError: There is no such run, or neither ``run.name`` nor an experiment, which has one, is given.
    """
    values = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    name = values.get("run.name")
    if name is None and "experiment" in values:
        return []
    if name is None:
        raise ConfigError("run.name: which run? Give run.name=<a run that exists>; got none")
    file = Path(values.get("run.root", "outputs")) / name / "overrides.json"
    if not file.is_file():
        raise ConfigError(
            f"run.name={name}: {file.parent} holds no run; start one first, or give the name of one that exists"
        )
    remedy = "give all settings of the run again, with run.if_exists=resume, and leave out the name of the stage"
    saved = map(str, read_json(file, list, remedy=remedy))
    return [override for override in saved if not override.startswith("run.if_exists=")]
