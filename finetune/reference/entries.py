"""One entry for each setting: what it is, what it may be, and what it is in each option of its group."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from finetune.config import RunConfig, compose
from finetune.config.fields import KINDS, dataclass_in, field_types, unknown_key
from finetune.errors import ConfigError
from finetune.paths import CONF
from finetune.reference.docstrings import field_docstrings
from finetune.reference.options import OptionValue, option_values
from finetune.reference.rules import allowed_values, rules_of

ABSENT = object()
"""Stands for no value."""

ANY = "*"
"""Stands in a key for a name that the user or an option gives, e.g. ``export.*.format``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What there is to know about a setting.

    Attributes:
        key: Dotted; `ANY` for a name of the user's own.
        type: In words.
        hint: The annotated type.
        has_default: Whether a run without an experiment has a value.
        default: That value.
        allowed: The words that it may be; empty where the rules do not list them.
        rules: What is refused, one sentence each.
        about: Its docstring.
        options: What the options of its group set it to.
        experiments: What experiments set it to.
    """

    key: str
    type: str
    hint: Any
    has_default: bool
    default: Any
    allowed: Sequence[str]
    rules: Sequence[str]
    about: str
    options: Sequence[OptionValue]
    experiments: Sequence[OptionValue]


@cache
def entries(group: str) -> list[Entry]:
    """Returns the settings of a group, in the order of its dataclass."""
    hint = field_types(RunConfig)[group]
    named = f"{group}.{ANY}" if typing.get_origin(hint) is dict else group
    rules, options = rules_of(group), option_values(group) if (CONF / group).is_dir() else {}
    experiments = {_generic(key, group, named): values for key, values in option_values("experiment").items()}
    found = []
    for key, kind, about, own in _leaves(dataclass_in(hint), named):
        relative = key.removeprefix(f"{named}.")
        default = _usual_value(key, own)
        found.append(
            Entry(
                key=key, type=type_in_words(kind), hint=kind, has_default=default is not ABSENT,
                default=None if default is ABSENT else default,
                allowed=allowed_values(rules.get(relative, [])), rules=rules.get(relative, []), about=about,
                options=options.get(relative, []), experiments=experiments.get(key, []),
            )
        )  # fmt: skip
    return found


def groups() -> list[str]:
    """Returns the groups that have settings, in the order of the schema."""
    return list(field_types(RunConfig))


def find(target: str) -> list[Entry]:
    """Returns the setting of a key, or all below a prefix, e.g. ``train.preference``; all settings for an empty one.

    Raises:
        ConfigError: There is no such setting; with the closest names.
    """
    group = target.partition(".")[0]
    if target and group not in groups():
        raise ConfigError(unknown_key(target, RunConfig) or f"{target}: not a setting")
    everything = [entry for name in ([group] if target else groups()) for entry in entries(name)]
    found = [entry for entry in everything if _holds(entry, target.split("."))] if target else everything
    if not found:
        raise ConfigError(
            unknown_key(target, RunConfig) or f"{target}: not a setting; `finetune config {group}` lists them"
        )
    return found


def type_in_words(hint: Any) -> str:
    """Returns a type as it is named in messages, e.g. ``a whole number or null``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [type_in_words(kind) for kind in typing.get_args(hint) if kind is not type(None)]
        return " or ".join([*kinds, "null"])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is dict:
        return f"names with {type_in_words(arguments[1])} each"
    return KINDS[hint][1] if hint in KINDS else "any value"


def _plural(hint: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(hint, "values")


def _leaves(owner: Any, prefix: str) -> Iterator[tuple[str, Any, str, Any]]:
    """Yields key, type, docstring and the dataclass's default of the fields that hold no dataclass."""
    about = field_docstrings(owner)
    for field in dataclasses.fields(owner):
        hint = field_types(owner)[field.name]
        kind, key = dataclass_in(hint), f"{prefix}.{field.name}"
        if kind:
            yield from _leaves(kind, f"{key}.{ANY}" if typing.get_origin(hint) is dict else key)
        elif field.default_factory is not dataclasses.MISSING:
            yield key, hint, about.get(field.name, ""), field.default_factory()
        else:
            default = ABSENT if field.default is dataclasses.MISSING else field.default
            yield key, hint, about.get(field.name, ""), default


def _usual_value(key: str, otherwise: Any) -> Any:
    """Returns the value of a run without an experiment; that of the dataclass where the run has no such part."""
    node: Any = _usual()
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return otherwise
        node = node[name]
    return ABSENT if node == "???" else node


@cache
def _usual() -> Any:
    """The configuration without an experiment; references to other settings are kept as they are written."""
    return OmegaConf.to_container(compose([]), resolve=False)


def _generic(key: str, group: str, named: str) -> str:
    """Returns a key with `ANY` in place of an option's name: ``export.hub.push`` becomes ``export.*.push``."""
    return re.sub(rf"^{group}\.[^.]+", named, key) if named != group else key


def _holds(entry: Entry, parts: list[str]) -> bool:
    """Whether a typed key is the entry's, the beginning of it, or a name in it where the entry is a mapping."""
    key = entry.key.split(".")
    is_longer = len(parts) > len(key)
    return (not is_longer or typing.get_origin(entry.hint) is dict) and all(
        name in (part, ANY) or part == ANY for name, part in zip(key, parts, strict=False)
    )
