"""Finds the fields of the configuration's dataclasses by dotted key, and checks the values that users give them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode
from omegaconf.errors import OmegaConfBaseException

from finetune.config.other_names import ABSENT, hint_for

KINDS = {
    int: (IntegerNode, "a whole number"),
    float: (FloatNode, "a number"),
    bool: (BooleanNode, "true or false"),
    str: (StringNode, "text"),
}
"""By Python type: OmegaConf's node, which converts what was typed, and the words for it."""

LARGEST_INTEGER = 2**63 - 1

MOST_HINTS = 3
"""A longer list of settings is not a hint."""


def all_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted key of every setting of a dataclass and of those inside it."""
    for name, hint in field_types(schema).items():
        if kind := dataclass_in(hint):
            yield from all_keys(kind, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def free_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yields the keys of mappings, whose entries users name themselves."""
    for name, hint in field_types(schema).items():
        if typing.get_origin(hint) is dict:
            yield f"{prefix}{name}"
        elif kind := dataclass_in(hint):
            yield from free_keys(kind, f"{prefix}{name}.")


def resolve_field(key: str, schema: Any) -> tuple[Any, str]:
    """Returns the dataclass and the field's name of a dotted key; for an entry of a mapping, those of the mapping.

    Raises:
        KeyError: There is no such field.
    """
    name, _, rest = key.partition(".")
    hint = field_types(schema)[name]
    kind, is_mapping = dataclass_in(hint), typing.get_origin(hint) is dict
    if is_mapping and kind:
        rest = rest.partition(".")[2]
    if rest and kind:
        return resolve_field(rest, kind)
    if rest and not is_mapping:
        raise KeyError(key)
    return schema, name


def resolve_type(key: str, schema: Any) -> Any:
    """Returns the annotated type of a dotted key, or of an entry of a mapping or list.

    Raises:
        KeyError: There is no such field.
    """
    hint = schema
    for name in key.replace("[", ".").replace("]", "").split("."):
        hint, _ = _without_none(hint)
        if _is_dataclass(hint):
            hint = field_types(hint)[name]
        elif typing.get_origin(hint) in (dict, list):
            hint = typing.get_args(hint)[-1]
        else:
            raise KeyError(key)
    return hint


def unknown_key(key: str, schema: Any, value: Any = ABSENT) -> str | None:
    """Returns why a key is not a setting, with what to write instead; None where it is one.

    Args:
        key: Dotted.
        schema: The dataclass of the whole configuration.
        value: What was typed, if anything; a hint about another tool's setting converts it.
    """
    try:
        resolve_field(key, schema)
    except KeyError:
        name = key.rpartition(".")[2]
        text = hint_for(name, value) or _nearest(key, schema) or "`finetune --cfg job` prints every setting"
        return f"{key}: there is no such setting; {text}"
    return None


def _nearest(key: str, schema: Any) -> str | None:
    """A setting of this very name in another group; else one that is spelled alike."""
    keys = sorted(set(all_keys(schema)))
    group, _, name = key.rpartition(".")
    same = [other for other in keys if other.rpartition(".")[2] == name and "." in other]
    if same:
        return f"did you mean {' or '.join(same)}?" if len(same) <= MOST_HINTS else None
    if group:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    else:
        names = difflib.get_close_matches(name, {other.rpartition(".")[2] for other in keys}, n=1, cutoff=0.85)
        near = [other for other in keys if other.rpartition(".")[2] in names][:MOST_HINTS]
    return f"did you mean {' or '.join(near)}?" if near else None


def value_problems(key: str, hint: Any, value: Any) -> Iterator[str]:
    """Yields why a value does not fit the type of a setting. ``???`` and interpolations fit every type.

    Args:
        key: Dotted, for the message.
        hint: The annotated type.
        value: What was typed, as Hydra's parser reads it.
    """
    hint, is_optional = _without_none(hint)
    if (isinstance(value, str) and ("${" in value or value == "???")) or (value is None and is_optional):
        return
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and isinstance(value, list):
        for index, item in enumerate(value):
            yield from value_problems(f"{key}[{index}]", arguments[0], item)
    elif origin is dict and isinstance(value, dict):
        for name, item in value.items():
            yield from value_problems(f"{key}.{name}", arguments[1], item)
    elif _is_dataclass(hint) and isinstance(value, dict):
        for name, item in value.items():
            if problem := unknown_key(str(name), hint):
                yield f"{key}.{problem}"
            else:
                yield from value_problems(f"{key}.{name}", field_types(hint)[str(name)], item)
    elif not _converts(hint, value):
        yield f"{key}: must be {_words(key, hint, value)}; got {'null' if value is None else repr(str(value))}"


def impossible_values(value: Any, key: str = "") -> Iterator[str]:
    """Yields every value that no setting can have: inf, nan, integers beyond 64 bit, and text with a NUL."""
    items: list[tuple[Any, Any]]
    if dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for name, item in items:
        yield from impossible_values(item, f"{key}[{name}]" if isinstance(value, list) else f"{key}.{name}".lstrip("."))
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key} must be a finite number; got {value}"
    if isinstance(value, str) and "\0" in value:
        yield f"{key} must not contain a NUL character, which no path or name may have; got {value!r}"
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        yield f"{key} must be at most {LARGEST_INTEGER} (64 bit); got one of {value.bit_length()} bits"


@cache
def field_types(schema: Any) -> dict[str, Any]:
    """Returns the annotated types of a dataclass's fields by name."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def dataclass_in(hint: Any) -> Any:
    """Returns the dataclass inside ``X``, ``X | None`` or ``dict[str, X]``; None where there is none."""
    hint, _ = _without_none(hint)
    if typing.get_origin(hint) is dict:
        hint = typing.get_args(hint)[1]
    return hint if dataclasses.is_dataclass(hint) else None


def _is_dataclass(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return (kinds[0] if len(kinds) == 1 else Any), len(kinds) < len(typing.get_args(hint))
    return hint, False


def _converts(hint: Any, value: Any) -> bool:
    if hint not in KINDS:
        return hint is Any
    try:
        KINDS[hint][0](value, is_optional=False)
    except OmegaConfBaseException:
        return False
    return True


def _words(key: str, hint: Any, value: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is list:
        return f"a list, e.g. '{key}=[{value}]'"
    if origin is dict:
        kind = KINDS.get(typing.get_args(hint)[1], (None, "settings"))[1]
        return f"names with {kind} each, e.g. '{key}={{<name>: ...}}'"
    return KINDS[hint][1] if hint in KINDS else f"settings by name, e.g. '{key}.<name>=...'"
