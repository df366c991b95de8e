"""Who set a value: the dataclass, a group's file, an experiment or the command line, each with its place."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from finetune.config import RunConfig, compose_config, register
from finetune.console import log, table
from finetune.errors import ConfigError
from finetune.overrides import OVERLAYS, opened, part_of, unknown
from finetune.paths import CONF, PACKAGE

ABSENT = object()
"""No value: a mandatory setting that nobody has set, or a part that is switched off."""

Keys = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One place that gives a key a value.

    Attributes:
        value: What it gives, as written there; `ABSENT` for a default that there is none of.
        by: ``default`` (of the dataclass), ``group``, ``config`` (conf/config.yaml), ``experiment``, ``debug`` or ``command line``.
        place: File and line, or what was typed.
    """

    value: Any
    by: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one file, or one word of the command line, sets.

    Attributes:
        values: By dotted key. A key with a list, a text or null ends there: what lies below it in other layers is replaced.
        places: By the same keys.
        group: The group that a file belongs to, e.g. ``train``; empty for anything else.
    """

    by: str
    values: Keys
    places: dict[str, str]
    group: str = ""

    def setting(self, key: str) -> Setting | None:
        """What the layer says of a key, or of the whole that the key is a part of."""
        found = next((name for name in _upwards(key) if name in self.values), None)
        return Setting(value=self.values[found], by=self.by, place=self.places[found]) if found else None


def explain(asked: str, overrides: Sequence[str]) -> None:
    """Prints who set a key, or each key of a group.

    Args:
        asked: A dotted key, e.g. ``train.micro_batch``, or a group, e.g. ``train``.
        overrides: The command line.

    Raises:
        ConfigError: There is no such setting, or this configuration has none of it.
    """
    values = flat(OmegaConf.to_container(compose_config(overrides), resolve=True))
    keys = [key for key in values if key == asked or key.startswith(f"{asked}.")]
    if not keys:
        raise ConfigError(_why_not(asked))
    chain, chosen, usual = layers(overrides)
    if keys != [asked]:
        rows = [[key, _shown(values[key]), (last := settings(key, chain)[-1]).by, last.place] for key in keys]
        table("plan", ["setting", "value", "set by", "where"], rows)
        return
    *before, last = settings(asked, chain)
    without = (
        f"without it: {_shown(before[-1].value)}, {_said(before[-1])}" if before else "without it there is no value"
    )
    log("plan", f"{asked} = {_shown(values[asked])}", f"set {_said(last)}", without)
    log("plan", *[f"before that: {_shown(one.value)}, {_said(one)}" for one in reversed(before[:-1])])
    group = next((layer.group for layer in reversed(chain) if layer.setting(asked)), "")
    if group in usual and chosen.get(group) != usual[group]:
        other = _with_option(asked, overrides, group, usual[group])
        log(
            "plan",
            f"{group}={chosen[group]} is not the option of conf/config.yaml; with {group}={usual[group]} it would be {other}",
        )


def settings(key: str, chain: Sequence[Layer]) -> list[Setting]:
    """All who set a key, the one that counts last. The dataclass comes first, and again where a part that was null came to be."""
    said = [layer for layer in chain if layer.setting(key)]
    found = [_default(key), *[setting for layer in said if (setting := layer.setting(key))]]
    return found if not said or key in said[-1].values else [*found, found[0]]


def layers(overrides: Sequence[str]) -> tuple[list[Layer], Keys, Keys]:
    """What is laid over the dataclasses' defaults, in order; the options chosen by group; those of conf/config.yaml."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        words = opened(overrides, RunConfig)
        found = loader.compute_defaults_list("config", words, RunMode.RUN)
        usual = loader.compute_defaults_list("config", [], RunMode.RUN).overrides.known_choices
    files = [
        _of_file(one.config_path, one.package or "")
        for one in found.defaults
        if one.config_path and not one.config_path.startswith(("hydra/", "schema/"))
    ]
    values = {override.input_line for override in found.config_overrides}
    parsed = OverridesParser.create().parse_overrides(words)
    typed = [
        _of_word(one.key_or_group, one.value(), was)
        for one, was in zip(parsed, overrides, strict=True)
        if one.input_line in values
    ]
    choices = found.overrides.known_choices
    return [*files, *typed], dict(choices), {group: usual[group] for group in usual if isinstance(usual[group], str)}


def typed(overrides: Sequence[str]) -> dict[str, str]:
    """The word of the command line that sets each key."""
    parsed = OverridesParser.create().parse_overrides(opened(overrides, RunConfig))
    return {
        key: word for one, word in zip(parsed, overrides, strict=True) for key in flat(one.value(), one.key_or_group)
    }


def flat(content: Any, prefix: str = "") -> Keys:
    """Nested mappings as dotted keys; an empty mapping is a value."""
    if not isinstance(content, Mapping) or not content:
        return {prefix: content} if prefix else {}
    return {
        key: value
        for name, item in content.items()
        for key, value in flat(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _of_file(path: str, package: str) -> Layer:
    file = CONF / f"{path}.yaml"
    text = file.read_text(encoding="utf-8")
    prefix = f"{package}." if package else ""
    content = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(content, dict), "Hydra has read it"
    # The file's own defaults list and Hydra's settings are no settings of ours.
    own = {name: value for name, value in content.items() if name not in ("defaults", "hydra")}
    lines = dict(_lines(yaml.compose(text)))
    group, _, _ = path.rpartition("/")
    overlay = group in OVERLAYS
    return Layer(
        by=group if overlay else "group" if group else "config",
        values={f"{prefix}{key}": value for key, value in flat(own).items()},
        places={f"{prefix}{key}": f"{_short(file)}:{lines[key]}" for key in flat(own)},
        group="" if overlay else group,
    )


def _of_word(key: str, value: Any, word: str) -> Layer:
    values = flat(value, key)
    return Layer(by="command line", values=values, places=dict.fromkeys(values, word))


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted key and line, from 1, of each value in a YAML file."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = f"{prefix}{name.value}"
            yield key, name.start_mark.line + 1
            yield from _lines(value, f"{key}.")


def _default(key: str) -> Setting:
    """What the dataclass says: a default with its line, or that there is none."""
    owner, name = part_of(key, RunConfig)
    found = next(field for field in dataclasses.fields(owner) if field.name == name)
    value = found.default if found.default is not dataclasses.MISSING else ABSENT
    if found.default_factory is not dataclasses.MISSING:
        value = found.default_factory()
    file, lines = _fields(owner)
    return Setting(value=value, by="default", place=f"{_short(file)}:{lines[name]}")


@cache
def _fields(owner: type) -> tuple[Path, dict[str, int]]:
    """A dataclass's file, and the line of each field."""
    source, first = inspect.getsourcelines(owner)
    body = ast.parse("".join(source)).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign)]
    lines = {node.target.id: node.lineno + first - 1 for node in fields if isinstance(node.target, ast.Name)}
    return Path(inspect.getfile(owner)), lines


def _why_not(asked: str) -> str:
    if not asked:
        return "plan explain: name a setting or a group, e.g. explain=lora.rank or explain=train"
    return (
        unknown(asked, RunConfig)
        or f"{asked}: this configuration has none of it, because a part above it is null or not chosen"
    )


def _with_option(key: str, overrides: Sequence[str], group: str, option: str) -> str:
    """The key's value if the group had another option."""
    others = [override for override in overrides if override.split("=")[0] != group]
    values = flat(OmegaConf.to_container(compose_config([*others, f"{group}={option}"]), resolve=True))
    return _shown(values.get(key, ABSENT))


def _said(one: Setting) -> str:
    if one.by == "default":
        return f"{'for there is no default' if one.value is ABSENT else 'by the default'} ({one.place})"
    return f"by the {one.by} ({one.place})"


def _shown(value: Any) -> str:
    if value is ABSENT or value == "???":
        return "no value"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _short(file: Path) -> str:
    """As seen from the checkout, or from where packages are installed."""
    return str(file.relative_to(PACKAGE.parent)) if file.is_relative_to(PACKAGE.parent) else str(file)


def _upwards(key: str) -> Iterator[str]:
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])
