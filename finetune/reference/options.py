"""What each option of a group sets, and the comments next to the values in its file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from finetune.config.overrides import group_options
from finetune.paths import CONF


@dataclass(frozen=True, slots=True)
class OptionValue:
    """The value that an option gives to a setting.

    Attributes:
        option: Its name, e.g. ``nf4_double``.
        value: As written; an interpolation such as ``${eval.loss_rows}`` stays one.
        comment: What its file says next to the value; often the source.
    """

    option: str
    value: Any
    comment: str = ""


@cache
def option_values(group: str) -> dict[str, list[OptionValue]]:
    """Returns by key, relative to the group, what its options set; a folder of overlays has whole keys.

    Values that an option takes from another one through its defaults are listed too.
    """
    found: dict[str, list[OptionValue]] = {}
    for option in group_options(group, [CONF]):
        for key, (value, comment) in _settings(CONF / group / f"{option}.yaml").items():
            found.setdefault(key, []).append(OptionValue(option, value, comment))
    return found


def option_content(group: str, option: str) -> Any:
    """Returns what an option sets, as OmegaConf's mapping."""
    content = OmegaConf.create()
    for key, (value, _) in _settings(CONF / group / f"{option}.yaml").items():
        OmegaConf.update(content, key, value)
    return content


def _settings(file: Path) -> dict[str, tuple[Any, str]]:
    text = file.read_text(encoding="utf-8")
    content: Any = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    found: dict[str, tuple[Any, str]] = {}
    for inherited in content.pop("defaults", []):
        if isinstance(inherited, str) and inherited != "_self_":
            found |= _settings(file.with_name(f"{inherited}.yaml"))
    comments = dict(_comments(yaml.compose(text), text.splitlines()))
    return found | {key: (value, comments.get(key, "")) for key, value in _flat(content)}


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested mappings by dotted key; an empty mapping is a value."""
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _comments(node: yaml.Node | None, lines: list[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields by dotted key the comment that follows a value on its line."""
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _comments(value, lines, f"{prefix}{name.value}.")
        elif value.end_mark.line < len(lines):
            rest = lines[value.end_mark.line][value.end_mark.column :].strip()
            if rest.startswith("#"):
                yield f"{prefix}{name.value}", rest.lstrip("# ")
