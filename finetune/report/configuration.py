"""The settings that a run changed against the defaults, and all of them."""

from __future__ import annotations

from typing import Any

import yaml
from omegaconf import OmegaConf

from finetune.config import compose
from finetune.html import Table
from finetune.provenance.config_trace import flat
from finetune.report.run_data import Fields, RunData

NAMED = ("export", "tracking")
"""Groups whose entries have names; the table lists the names."""

NOT_SHOWN = ("run.name", "model.architecture", "data.cache")
"""Settings that the page shows elsewhere, and their beginnings."""


def configuration_section(data: RunData) -> Fields:
    """Collects the settings that differ from a run without an experiment, and the whole configuration as YAML."""
    if not data.config:
        return {"changes": None, "yaml": ""}
    usual, own = _settings(OmegaConf.to_container(compose([]), resolve=True)), _settings(data.config)
    changed = [key for key, value in own.items() if value != usual.get(key) and not key.startswith(NOT_SHOWN)]
    rows = [[key, _shown(own[key]), _shown(usual[key]) if key in usual else "not set"] for key in changed]
    return {
        "changes": Table(header=["Setting", "This run", "Default"], rows=rows, text_columns=3),
        "yaml": yaml.safe_dump(data.config, sort_keys=False, allow_unicode=True),
    }


def _settings(config: Any) -> dict[str, Any]:
    """Returns the settings by dotted key; of groups with named entries, the names alone."""
    named = {group: sorted(config.get(group) or {}) for group in NAMED}
    return {**flat({name: value for name, value in config.items() if name not in NAMED}), **named}


def _shown(value: Any) -> str:
    """Returns a value as it is typed."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return {"None": "null", "True": "true", "False": "false", "???": "none"}.get(str(value), str(value))
