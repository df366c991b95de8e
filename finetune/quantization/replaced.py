"""Replaces an entry of a table of transformers for a while, so that it loads models with classes of this project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(table: Any, key: str, value: Any) -> Iterator[None]:
    """Puts ``value`` under an existing key of a mapping while the context is open."""
    before = table[key]
    table[key] = value
    try:
        yield
    finally:
        table[key] = before
