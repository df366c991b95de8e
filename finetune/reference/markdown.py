"""The reference as a page of Markdown, and an entry as lines of text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from finetune.config import RunConfig
from finetune.config.fields import dataclass_in, field_types
from finetune.jsonable import to_jsonable
from finetune.reference.entries import Entry, entries, groups
from finetune.reference.options import OptionValue

MOST_VALUES = 8
"""A setting with more different values, such as the dimensions of models, gets their number instead."""

MOST_NAMES = 5
"""Options with one value that are named."""

INTRO = """# Settings

{count} settings in {groups} groups, written from the dataclasses in `finetune/`, their checks and the files in `conf/`.
`finetune config KEY` prints the same in the terminal. *Default* is the value of a run without an experiment. A `*`
stands for a name: `export.*.rows` is typed as `export.gguf_q8_0.rows`.
"""


def page() -> str:
    """Returns the page of all settings, one section for each group."""
    sections = [(group, entries(group)) for group in groups()]
    lines = [INTRO.format(count=sum(len(found) for _, found in sections), groups=len(sections))]
    for group, found in sections:
        lines += [f"## {group}", "", _markdown(group_docstring(group)), ""]
        for entry in found:
            lines += [f"### `{entry.key}`", "", f"{entry.type}; {default_of(entry)}", "", _markdown(entry.about), ""]
            lines += [*(f"- {_markdown(line)}" for line in facts_of(entry)), ""]
    return "\n".join(lines)


def group_docstring(group: str) -> str:
    """Returns what a group is for."""
    return inspect.cleandoc(dataclass_in(field_types(RunConfig)[group]).__doc__ or "")


def default_of(entry: Entry) -> str:
    """Returns the default in words."""
    return f"default `{shown(entry.default)}`" if entry.has_default else "no default"


def facts_of(entry: Entry) -> Iterator[str]:
    """Yields allowed values, rules, and what options and experiments set, a line each."""
    differs = any(rule.startswith(entry.key.partition(".")[0]) for rule in entry.rules)
    if entry.allowed and not differs:
        yield f"one of {', '.join(f'`{word}`' for word in entry.allowed)}"
    yield from (rule for rule in entry.rules if differs or not (entry.allowed and rule.startswith("must be one of")))
    usual = {shown(entry.default)} if entry.has_default else set()
    if entry.options and {shown(item.value) for item in entry.options} != usual:
        yield f"set by options of `{entry.key.partition('.')[0]}`: {_by_value(entry.options)}"
    if entry.experiments:
        yield f"set by experiments: {_by_value(entry.experiments)}"


def shown(value: Any) -> str:
    """Returns a value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {shown(item)}" for name, item in value.items()) + "}"
    return "''" if value == "" else str(value)


def as_json(entry: Entry) -> dict[str, Any]:
    """Returns an entry as plain values, for ``finetune config --json``."""
    names = ("key", "type", "default", "allowed", "rules", "about", "options", "experiments")
    return {name: to_jsonable(getattr(entry, name)) for name in names} | {"has_default": entry.has_default}


def _by_value(values: Sequence[OptionValue]) -> str:
    by_value: dict[str, list[OptionValue]] = {}
    for item in values:
        by_value.setdefault(shown(item.value), []).append(item)
    if len(by_value) > MOST_VALUES:
        return f"{len(by_value)} different values in {len(values)} options"
    return "; ".join(f"`{value}` in {_names(items)}" for value, items in by_value.items())


def _names(items: Sequence[OptionValue]) -> str:
    named = [f"`{item.option}`" for item in items[:MOST_NAMES]]
    more = [f"{len(items) - MOST_NAMES} more"] if len(items) > MOST_NAMES else []
    comments = list(dict.fromkeys(item.comment for item in items if item.comment))
    return ", ".join([*named, *more]) + (f" ({'; '.join(comments)})" if comments else "")


def _markdown(text: str) -> str:
    """Returns a docstring as Markdown: one backtick instead of two, and ``<`` outside of them begins no tag."""
    parts = text.replace("``", "`").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))
