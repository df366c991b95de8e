"""Warns about settings that a user typed and that have no effect given the others."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from finetune.config import RunConfig
from finetune.provenance.config_trace import typed


class UnusedSetting(UserWarning):
    """A setting that was typed and has no effect. The tests turn it into an error."""


def unused_overrides(config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Returns a sentence for each override that has no effect given the other settings."""
    words = typed(overrides)
    reasons: dict[str, str] = {}
    for key, reason in unused_settings(config):
        word = override_of(key, words)
        if word:
            reasons.setdefault(word, reason)
    return [f"{word} has no effect: {reason}" for word, reason in reasons.items()]


def warn_unused_overrides(config: RunConfig, overrides: Sequence[str]) -> None:
    """Warns, when a run begins, about each override that has no effect."""
    for sentence in unused_overrides(config, overrides):
        warnings.warn(UnusedSetting(sentence), stacklevel=2)


def unused_settings(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted keys that ``unused()`` of each group names, with the reasons."""
    if hasattr(config, "unused"):
        yield from ((f"{prefix}{name}", reason) for name, reason in config.unused())
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for name, part in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(part):
                yield from unused_settings(part, f"{prefix}{field.name}.{name}." if name else f"{prefix}{field.name}.")


def override_of(key: str, words: dict[str, str]) -> str | None:
    """Returns the override that sets a key, or something inside it."""
    return next((word for name, word in words.items() if name == key or name.startswith(f"{key}.")), None)
