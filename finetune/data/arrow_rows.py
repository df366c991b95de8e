"""Rows of Arrow, Parquet and the hub, without what their columns add: each object has the fields of all others."""

import math
from collections import Counter
from typing import Any

FIELDS, NUMBERS, LINES = "null fields", "empty numbers", "line ends"
"""What is changed while rows are read, by name; a `collections.Counter` counts them."""


def unpad(row: Any, changes: Counter[str]) -> Any:
    """Removes null fields inside a row's objects, and reads NaN as null.

    A column of objects has one type, so an object comes back with the fields of all others, as null: a tool with the
    parameters of every tool. pandas writes a column without any value as NaN.

    Args:
        row: Its own columns are kept, also where they are null.
        changes: Receives how many values were changed.
    """
    if not isinstance(row, dict):
        return row
    return {name: _value(item, changes) for name, item in row.items()}


def _value(value: Any, changes: Counter[str]) -> Any:
    if isinstance(value, dict):
        kept = {name: _value(item, changes) for name, item in value.items() if item is not None}
        changes[FIELDS] += len(value) - len(kept)
        return kept
    if isinstance(value, list):
        return [_value(item, changes) for item in value]
    if isinstance(value, float) and math.isnan(value):
        changes[NUMBERS] += 1
        return None
    return value


def describe(changes: Counter[str]) -> list[str]:
    """Returns one sentence for each kind of change."""
    sentences = {
        FIELDS: "null fields inside objects are left out, since Arrow and Parquet give every object the fields of all "
        "others; to keep a null, store tools and arguments as JSON text",
        NUMBERS: "empty numbers (NaN) are read as null, as pandas writes columns without a value",
        LINES: "line ends inside cells (\\r) are read as \\n",
    }
    return [f"{changes[kind]:,} {sentence}" for kind, sentence in sentences.items() if changes[kind]]
