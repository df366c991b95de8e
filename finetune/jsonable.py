"""Converts dataclasses to JSON values and back: the form of manifests, of requests to other processes and of hashes."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Value = TypeVar("Value")

OMIT_NONE = {"none": "omitted"}
"""Metadata of a dataclass field that JSON leaves out where it is None."""

EMPTY_NONE = {"none": "empty"}
"""Metadata of a dataclass field that JSON writes as ``{}`` where it is None."""


def to_jsonable(value: Any) -> Any:
    """Converts dataclasses, paths and tuples to JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dict(_json_fields(value))
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def flatten(settings: Any) -> dict[str, Any]:
    """Returns a dict or dataclass as JSON values by dotted names: of ``{"lora": LoraConfig(...)}``, ``lora.rank``."""
    flat: dict[str, Any] = {}
    for name, value in to_jsonable(settings).items():
        if isinstance(value, dict) and value:
            flat.update({f"{name}.{rest}": entry for rest, entry in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def _json_fields(value: Any) -> Iterator[tuple[str, Any]]:
    for entry in dataclasses.fields(value):
        item, none = getattr(value, entry.name), entry.metadata.get("none")
        if entry.repr and not (item is None and none == "omitted"):
            yield entry.name, {} if item is None and none == "empty" else to_jsonable(item)


def from_json(target: type[Value], value: Any) -> Value:
    """Converts JSON values back to a dataclass: the inverse of `to_jsonable` for dataclasses, paths and lists."""
    return cast(Value, _from_json(target, value))


def _from_json(target: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(target):
        types = get_type_hints(target)
        return target(**{name: _from_json(types.get(name), item) for name, item in value.items()})  # type: ignore[operator]
    origin, arguments = get_origin(target), get_args(target)
    if origin in (Union, UnionType):  # always "X | None" here
        is_none = value is None or (value == {} and dataclasses.is_dataclass(arguments[0]))
        return None if is_none else _from_json(arguments[0], value)
    if isinstance(value, list) and arguments:
        return [_from_json(arguments[0], item) for item in value]
    if isinstance(value, dict) and arguments:
        return {key: _from_json(arguments[1], item) for key, item in value.items()}
    return Path(value) if target is Path else value
