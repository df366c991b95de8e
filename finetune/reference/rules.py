"""What a setting's check refuses, found by giving the check values that are wrong: so no list of rules can be old."""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from finetune.config import RunConfig, compose
from finetune.config.fields import dataclass_in, field_types
from finetune.config.overrides import group_options
from finetune.paths import CONF
from finetune.reference.options import option_content

PROBES: dict[Any, tuple[Any, ...]] = {int: (-1, 0), float: (-1.0, 0.0, 1.0, 2.0), str: ("?", ""), Any: ("?", 0)}
"""By type, values that a rule may refuse."""

LIST = re.compile(r"\bmust be (?:one of (.+?)|((?!\d)[\w.-]+ or [\w.-]+))(?: for [\w.=]+)?$")
"""A rule that lists the allowed values."""

NAME = "org/model"
"""Stands for a model, where none is chosen."""


def rules_of(group: str) -> dict[str, list[str]]:
    """Returns by key, relative to the group, the sentences of its checks without the value that they refuse.

    Each option is tried, since some rules hold for some options only, e.g. the group size of HQQ.
    """
    found: dict[str, list[str]] = {}
    for part in _parts(group):
        usual = set(part.problems()) if hasattr(part, "problems") else set()
        for key, owner, name, kind in _fields(part):
            value = getattr(owner, name)
            for probe in PROBES.get(kind, ()):
                setattr(owner, name, probe)
                sentences = [_rule(problem) for problem in part.problems() if problem not in usual]
                found.setdefault(key, []).extend(text for text in sentences if _is_about(text, name))
            setattr(owner, name, value)
    return {key: _distinct(sentences) for key, sentences in found.items() if sentences}


def allowed_values(rules: list[str]) -> list[str]:
    """Returns the words that the rules allow; empty where they do not list them."""
    lists = [LIST.search(rule) for rule in rules]
    words = [re.split(r", | or ", match.group(1) or match.group(2)) for match in lists if match]
    return list(dict.fromkeys(word for group in words for word in group))


def _parts(group: str) -> Iterator[Any]:
    """Yields the group of a configuration with each of its options in turn."""
    hint = field_types(RunConfig)[group]
    kind = dataclass_in(hint)
    config = copy.deepcopy(_usual())
    options = group_options(group, [CONF]) if (CONF / group).is_dir() else []
    if group in ("model", "hardware"):
        options = options[:1]  # they differ in dimensions only
    for option in options:
        content = OmegaConf.merge(OmegaConf.structured(kind), option_content(group, option))
        config[group] = {option: content} if typing.get_origin(hint) is dict else content
        if group == "model":
            config.model.name = NAME
        part: Any = getattr(OmegaConf.to_object(config), group)
        yield part[option] if isinstance(part, dict) else part
    if not options:
        yield getattr(OmegaConf.to_object(config), group)


@cache
def _usual() -> DictConfig:
    return compose([f"model.name={NAME}"])


def _fields(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Yields key, owner, name and type of each setting, without the None of optional ones."""
    owner: Any = type(part)
    for name, hint in field_types(owner).items():
        value = getattr(part, name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
            yield f"{prefix}{name}", part, name, kinds[0] if len(kinds) == 1 else hint


def _rule(problem: str) -> str:
    return problem.partition("; got")[0]


def _is_about(rule: str, name: str) -> bool:
    """Whether a sentence begins with the setting's key and does not repeat the value that it refuses."""
    return bool(re.match(rf"[\w.*?]*\b{name}\b[^=]", f"{rule} ")) and not re.search(r"[ :]\?|  ", rule)


def _distinct(sentences: list[str]) -> list[str]:
    """Returns the sentences without their key, one of those that differ in figures; with it where options differ."""
    short = {re.sub(r"\d+", "0", text): text for text in (_without_key(sentence) for sentence in reversed(sentences))}
    if len(short) == 1:
        return list(short.values())
    by_rule = {_without_key(sentence): sentence for sentence in reversed(sentences)}
    return [
        by_rule[rule] if rule.startswith(("must be one of", "must be left out")) else rule
        for rule in reversed(short.values())
    ]


def _without_key(sentence: str) -> str:
    return re.sub(r"^[\w*?]*\.[\w.*?]+:? (?=must|is|may|has)", "", sentence)
