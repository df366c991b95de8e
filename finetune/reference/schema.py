"""A JSON schema of an experiment's file, for completion and checks in an editor."""

from __future__ import annotations

import types
import typing
from typing import Any

from finetune.config import RunConfig
from finetune.config.fields import dataclass_in, field_types
from finetune.reference.docstrings import field_docstrings
from finetune.reference.entries import ANY, Entry, entries, groups
from finetune.reference.markdown import group_docstring

TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
REFERENCE = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
"""A reference to another setting, or no value yet."""


def experiment_schema() -> dict[str, Any]:
    """Returns the schema of a file in ``conf/experiment/``; a key that is not a setting is an error in it."""
    known = {entry.key: entry for group in groups() for entry in entries(group)}
    properties = {group: _node(field_types(RunConfig)[group], group, known) for group in groups()}
    for group, node in properties.items():
        node["description"] = group_docstring(group).replace("``", "`")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "An experiment of finetune",
        **_object(properties | {"defaults": {"type": "array"}, "hydra": {"type": "object"}}),
    }


def _node(hint: Any, key: str, known: dict[str, Entry]) -> dict[str, Any]:
    kind, is_mapping = dataclass_in(hint), typing.get_origin(hint) is dict
    if kind and is_mapping:
        return {"type": "object", "additionalProperties": _fields(kind, f"{key}.{ANY}", known)}
    if kind:
        return _fields(kind, key, known)
    entry = known[key]
    node = {"description": entry.about.replace("``", "`")} | _value(hint, list(entry.allowed))
    return node | ({"default": entry.default} if entry.has_default else {})


def _fields(kind: Any, key: str, known: dict[str, Entry]) -> dict[str, Any]:
    node = _object({name: _node(hint, f"{key}.{name}", known) for name, hint in field_types(kind).items()})
    for name, text in field_docstrings(kind).items():
        node["properties"][name].setdefault("description", text.replace("``", "`"))
    return node


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _value(hint: Any, allowed: list[str]) -> dict[str, Any]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = list(typing.get_args(hint)) if is_union else [hint]
    return {"anyOf": [*(_type(kind, allowed) for kind in kinds), REFERENCE]} if Any not in kinds else {}


def _type(kind: Any, allowed: list[str]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return {"type": "array", "items": _value(arguments[0], [])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(arguments[1], [])}
    if kind is type(None):
        return {"type": "null"}
    values: list[Any] = [int(word) for word in allowed] if kind is int else allowed
    return {"type": TYPES[kind]} | ({"enum": values} if allowed and kind in (int, str) else {})
