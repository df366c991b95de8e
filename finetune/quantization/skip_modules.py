"""Selects layers that stay in full precision, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from finetune.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

HEADS = ("lm_head",)


def skip_patterns(skip_modules: Iterable[str]) -> list[str]:
    """Returns regular expressions for names of layers and of their weights, as transformers' loaders take them.

    Args:
        skip_modules: Last segments (``down_proj``), or full names with ``*`` for anything (``model.layers.0.*``).
    """
    return [*HEADS, *map(_regex, skip_modules)]


def is_skipped(name: str, skip_modules: Iterable[str]) -> bool:
    """Returns whether an entry matches a layer's full name; heads are always skipped."""
    return name.rpartition(".")[2] in HEADS or any(_matches(entry, name) for entry in skip_modules)


def _matches(entry: str, name: str) -> bool:
    return re.fullmatch(_regex(entry), name) is not None


def _regex(entry: str) -> str:
    escaped = ".*".join(map(re.escape, entry.split("*")))
    return ("" if "." in entry or "*" in entry else r"(?:.*\.)?") + escaped + r"(?:\.weight)?$"


def check_skip_modules(model: nn.Module, skip_modules: Sequence[str]) -> None:
    """Checks that every entry matches a linear layer.

    Raises:
        ModelError: An entry matches none.
    """
    from torch import nn

    from finetune.quantization.backends import backend_of

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or backend_of(module)]
    unmatched = [entry for entry in skip_modules if not any(_matches(entry, name) for name in names)]
    if unmatched:
        available = sorted({name.rpartition(".")[2] for name in names})
        raise ModelError(
            f"quantization.skip_modules: {', '.join(unmatched)} match no linear layer; this model has "
            f"{', '.join(available)}, with full names such as {names[0] if names else 'none'}"
        )
