"""Names the figures of a finished stage for trackers: ``eval/merged/perplexity``, ``merge/original/kl``."""

from collections.abc import Mapping
from typing import Any

from finetune.jsonable import to_jsonable

NAMED = ("name", "format")
"""Keys that name an item of a list."""


def figures(stage: str, product: Any) -> dict[str, float]:
    """Returns all numbers of a product, flat.

    Args:
        stage: The first part of each name, e.g. ``eval``.
        product: A stage's product, or a dict of one.

    Returns:
        ``{"eval/adapter/perplexity": 1.13, "eval/adapter/json_exact": 0.63, "eval/adapter/json_exact_low": ...}``.
        A metric's ``value`` has the name of the metric; the levels ``metrics`` and ``artifacts`` are left out.
    """
    return dict(_flat(stage, to_jsonable(product)))


def _flat(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [(name, float(value))]
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flat(_joined(name, str(key)), item)]
    if isinstance(value, list):
        return [pair for item in value if (key := _item_name(item)) for pair in _flat(_joined(name, key), item)]
    return []


def _joined(name: str, key: str) -> str:
    if key in ("artifacts", "metrics", "candidates", "exports", "value", "difference"):
        return name
    return f"{name}_{key}" if key in ("low", "high") else f"{name}/{key}"


def _item_name(item: Any) -> str | None:
    return next((item[key] for key in NAMED if key in item), None) if isinstance(item, Mapping) else None
