"""Settings that a command line implies: the quickstart's, and those that a run was started with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import ConfigError


def with_experiment(overrides: Sequence[str]) -> list[str]:
    """Adds the quickstart where no experiment is named."""
    is_named = any(override.lstrip("+").startswith("experiment=") for override in overrides)
    return [*overrides] if is_named else ["+experiment=quickstart", *overrides]


def saved_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns what the run of ``run.name`` was started with, so that a later command composes the same.

    Raises:
        ConfigError: There is no such run.
    """
    values = dict(override.split("=", 1) for override in overrides if "=" in override)
    name = values.get("run.name")
    if name is None:
        return []
    file = Path(values.get("run.root", "outputs")) / name / "overrides.json"
    if not file.is_file():
        raise ConfigError(
            f"run.name={name}: {file.parent} holds no run; start one first, or give the name of one that exists"
        )
    saved = map(str, json.loads(file.read_text(encoding="utf-8")))
    return [override for override in saved if not override.startswith("run.if_exists=")]
