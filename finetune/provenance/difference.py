"""Compares two runs: configuration, environment, data and figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.console import log, table
from finetune.errors import ConfigError
from finetune.provenance.config_trace import ABSENT
from finetune.run import STAGES, RunFolder

WIDTH = 36
"""Characters of a value that fit next to another one on the console."""

NAMES = ("name", "format")
"""Keys that identify the entries of a list: candidates and checks have a name, exports a format."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One key that two runs have different values for; `ABSENT` where a run has none."""

    part: str
    key: str
    one: Any
    two: Any


def compare(one: Path, two: Path, *, as_json: bool = False) -> list[Difference]:
    """Prints the differences between two run folders.

    Args:
        one: A run folder.
        two: Another.
        as_json: Prints a JSON list instead of tables; an absent value is left out.

    Raises:
        ConfigError: One of them holds no run.
    """
    changed = differences(read(one), read(two))
    if as_json:
        plain = [{name: value for name, value in asdict(item).items() if value is not ABSENT} for item in changed]
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
        return changed
    for part in dict.fromkeys(item.part for item in changed):
        rows = [[item.key, _cell(item.one), _cell(item.two), _change(item)] for item in changed if item.part == part]
        table("diff", [part, one.name, two.name, "change"], rows)
    if not changed:
        log("diff", f"{one} and {two} hold the same configuration, environment, data and figures")
    return changed


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads a run folder: configuration, environment, data and figures by dotted key.

    Raises:
        ConfigError: The folder holds no run.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} holds no run (there is no config.yaml in it); give the name of a run that was started"
        )
    run = RunFolder(folder)
    products = {stage: manifest for stage in STAGES if (manifest := run.manifest(stage)) is not None}
    environment = folder / "environment.json"
    figures = {
        stage: {**manifest["product"], **{key: manifest[key] for key in COSTS if key in manifest}}
        for stage, manifest in products.items()
    }
    data = figures.pop("data", {})
    return {
        "config": named(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))),
        "environment": named(json.loads(environment.read_text(encoding="utf-8"))) if environment.is_file() else {},
        "data": named(data),
        "figures": named(figures),
    }


COSTS = ("seconds", "peak_rss_bytes", "peak_device_bytes")


def differences(one: Mapping[str, Mapping[str, Any]], two: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """Returns the keys whose values are not equal, in the order of the first run."""
    return [
        Difference(part=part, key=key, one=one[part].get(key, ABSENT), two=two[part].get(key, ABSENT))
        for part in one
        for key in dict.fromkeys([*one[part], *two[part]])
        if one[part].get(key, ABSENT) != two[part].get(key, ABSENT)
    ]


def named(content: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings, and lists of named entries, as dotted keys; leaves out other lists of records."""
    if isinstance(content, list) and content and all(isinstance(item, Mapping) for item in content):
        name = next((name for name in NAMES if all(name in item for item in content)), None)
        content = {str(item[name]): item for item in content} if name else {}
    elif not isinstance(content, Mapping) or not content:
        return {prefix: content}
    return {
        key: value
        for name, item in content.items()
        for key, value in named(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _cell(value: Any) -> str:
    if value is ABSENT:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _change(item: Difference) -> str:
    both = (item.one, item.two)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in both)
    return f"{item.two - item.one:+.6g}" if numbers else ""
