"""A finished stage's figures under the names that trackers get: ``eval/merged/perplexity``, ``merge/original/kl``."""

from collections.abc import Mapping
from typing import Any

from finetune.run import to_jsonable

NAMED = ("name", "format")
"""Keys that name an item of a list, so that its figures are filed under it."""


def figures(room: str, product: Any) -> dict[str, float]:
    """All numbers of a product, flat.

    Args:
        room: The first part of each name, e.g. ``eval``.
        product: A stage's product, or a dict of one.

    Returns:
        ``{"eval/adapter/perplexity": 1.13, "eval/adapter/json_exact": 0.63, "eval/adapter/json_exact_low": ...}``: a metric's
        ``value`` stands under the metric's own name, and the level called ``metrics`` or ``artifacts`` is left out.
    """
    return dict(_flat(room, to_jsonable(product)))


def _flat(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [(name, float(value))]
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _flat(_joined(name, str(key)), item)]
    if isinstance(value, list):
        return [found for item in value if (key := _own_name(item)) for found in _flat(_joined(name, key), item)]
    return []


def _joined(name: str, key: str) -> str:
    if key in ("artifacts", "metrics", "candidates", "exports", "value", "difference"):
        return name
    return f"{name}_{key}" if key in ("low", "high") else f"{name}/{key}"


def _own_name(item: Any) -> str | None:
    return next((item[key] for key in NAMED if key in item), None) if isinstance(item, Mapping) else None
