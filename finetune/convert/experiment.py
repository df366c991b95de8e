"""Writes a translation as an experiment: YAML with a comment for each key, and a list of what is missing."""

from __future__ import annotations

from typing import Any

import yaml

from finetune.convert.translate import Setting, Translation

WIDEST = 118
SHORTEST = 20
"""Columns below which a comment is left out."""


def experiment_text(translation: Translation, *, name: str) -> str:
    """Returns the experiment.

    Args:
        translation: Of the other tool's file.
        name: ``run.name`` of its runs.
    """
    file = translation.file
    lines = [
        "# @package _global_",
        f"# Converted from {file.path.name} ({file.tool}) by `finetune convert`; comments name the settings there.",
    ]
    lines += _defaults(translation.choices)
    lines += ["", "run:", f"  name: {name}"]
    groups: dict[str, list[Setting]] = {}
    for item in translation.settings:
        group, _, key = item.key.partition(".")
        groups.setdefault(group, []).append(Setting(key, item.value, item.source))
    run = groups.pop("run", [])
    lines += [line for item in run if item.key != "name" for line in _entry(item, 2)]
    for group in sorted(groups):
        lines += ["", f"{group}:", *_nested(groups[group])]
    if translation.missing:
        lines += ["", f"# Not translated ({len(translation.missing)}):"]
        lines += [_cut(f"#   {key}: {_one_line(value)} -- {reason}") for key, value, reason in translation.missing]
    return "\n".join(lines) + "\n"


def _defaults(choices: list[Setting]) -> list[str]:
    if not choices:
        return []
    lines = [f"  - override /{item.key}: {_yaml(item.value)} # {item.source}" for item in choices]
    return ["defaults:", *lines]


def _nested(items: list[Setting]) -> list[str]:
    """Entries of a group; those of a group inside it follow under its name."""
    lines: list[str] = []
    inner: dict[str, list[Setting]] = {}
    for item in items:
        group, dot, key = item.key.partition(".")
        if dot:
            inner.setdefault(group, []).append(Setting(key, item.value, item.source))
        else:
            lines += _entry(item, 2)
    for group, entries in inner.items():
        lines += [f"  {group}:", *(f"  {line}" for line in _nested(entries))]
    return lines


def _entry(item: Setting, indent: int) -> list[str]:
    pad = " " * indent
    if isinstance(item.value, dict):
        block = yaml.safe_dump(item.value, sort_keys=False, allow_unicode=True).splitlines()
        return [f"{pad}{item.key}: # {item.source}", *(f"{pad}  {line}" for line in block)]
    setting, comment = f"{pad}{item.key}: {_yaml(item.value)}", f" # {item.source.rstrip(':')}"
    return [setting + _cut(comment, WIDEST - len(setting))]


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:g}"
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).split("\n...")[0].strip()


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())[:70]


def _cut(line: str, width: int = WIDEST) -> str:
    return line if len(line) <= width else f"{line[: max(width - 3, 0)]}..." if width > SHORTEST else ""
