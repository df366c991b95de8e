"""Layers that stay in full precision, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from finetune.errors import ModelError

HEADS = ("lm_head",)


def patterns(keep: Iterable[str]) -> list[str]:
    """Regular expressions for names of layers and of their weights, as transformers' loaders take them.

    Args:
        keep: Last segments (``down_proj``), or full names with ``*`` for anything (``model.layers.0.*``).
    """
    return [*HEADS, *[_pattern(wish) for wish in keep]]


def is_kept(name: str, keep: Iterable[str]) -> bool:
    """Whether a layer's full name is among the wishes; heads always are."""
    return name.rpartition(".")[2] in HEADS or any(_names(wish, name) for wish in keep)


def _names(wish: str, name: str) -> bool:
    return re.fullmatch(_pattern(wish), name) is not None


def _pattern(wish: str) -> str:
    whole = ".*".join(map(re.escape, wish.split("*")))
    return ("" if "." in wish or "*" in wish else r"(?:.*\.)?") + whole + r"(?:\.weight)?$"


def check_keep(model: Any, keep: Sequence[str]) -> None:
    """
    Raises:
        ModelError: A wish matches no linear layer.
    """
    from torch import nn

    from finetune.quantization.backends import library_of

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or library_of(module)]
    unmatched = [wish for wish in keep if not any(_names(wish, name) for name in names)]
    if unmatched:
        found = sorted({name.rpartition(".")[2] for name in names})
        raise ModelError(
            f"quantization.keep: {', '.join(unmatched)} match no linear layer; this model has {', '.join(found)}, "
            f"with full names such as {names[0] if names else 'none'}"
        )
