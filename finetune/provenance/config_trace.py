"""Finds who set a value: the dataclass, a group's file, an experiment or the command line, each with its place."""

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

from finetune.config import RunConfig, compose
from finetune.config.compose import with_model_option
from finetune.config.fields import resolve_field, unknown_key
from finetune.config.overrides import OVERLAYS, allow_free_keys
from finetune.console import log, table
from finetune.errors import ConfigError
from finetune.paths import CONF, PACKAGE

ABSENT = object()
"""Stands for no value: a mandatory setting that nobody has set, or a part that is switched off."""

Keys = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One place that gives a key a value.

    Attributes:
        value: As written there; `ABSENT` where the dataclass has no default.
        by: ``default`` (of the dataclass), ``group``, ``config`` (conf/config.yaml), ``experiment``, ``debug`` or
            ``command line``.
        place: File and line, or what was typed.
    """

    value: Any
    by: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The settings of one file or of one override.

    Attributes:
        by: As `Setting.by`.
        values: By dotted key. A list, a text or null replaces everything below its key in other layers.
        places: File and line, or the override, by the same keys.
        group: The group that a file belongs to, e.g. ``train``; empty for anything else.
    """

    by: str
    values: Keys
    places: dict[str, str]
    group: str = ""

    def setting(self, key: str) -> Setting | None:
        """Returns the layer's value for a key or for the whole that holds it; None where it sets neither."""
        name = next((name for name in _upwards(key) if name in self.values), None)
        return Setting(value=self.values[name], by=self.by, place=self.places[name]) if name else None


def explain(target: str, overrides: Sequence[str]) -> None:
    """Prints who set a key, or each key of a group.

    Args:
        target: A dotted key, e.g. ``train.micro_batch``, or a group, e.g. ``train``.
        overrides: The command line.

    Raises:
        ConfigError: There is no such setting, or it is not part of this configuration.
    """
    values = flat(OmegaConf.to_container(compose(overrides), resolve=True))
    keys = [key for key in values if key == target or key.startswith(f"{target}.")]
    if not keys:
        raise ConfigError(_why_missing(target))
    chain, chosen, usual = layers(overrides)
    if keys != [target]:
        last = {key: settings(key, chain)[-1] for key in keys}
        rows = [[key, _shown(values[key]), last[key].by, last[key].place] for key in keys]
        table("plan", ["setting", "value", "set by", "where"], rows)
        return
    *before, last_setting = settings(target, chain)
    without = (
        f"without it: {_shown(before[-1].value)}, {_set_by(before[-1])}" if before else "without it there is no value"
    )
    log("plan", f"{target} = {_shown(values[target])}", f"set {_set_by(last_setting)}", without)
    log("plan", *[f"before that: {_shown(item.value)}, {_set_by(item)}" for item in reversed(before[:-1])])
    group = next((layer.group for layer in reversed(chain) if layer.setting(target)), "")
    if group in usual and chosen.get(group) != usual[group]:
        other = _with_option(target, overrides, group, usual[group])
        log(
            "plan",
            f"{group}={chosen[group]} is not the option of conf/config.yaml; "
            f"with {group}={usual[group]} it would be {other}",
        )


def settings(key: str, chain: Sequence[Layer]) -> list[Setting]:
    """Returns all who set a key, the one that counts last.

    The dataclass comes first. It comes last too where a later layer created the part that holds the key.
    """
    setting_layers = [layer for layer in chain if layer.setting(key)]
    default = _default(key)
    chain_of_key = [default, *[setting for layer in setting_layers if (setting := layer.setting(key))]]
    is_own = not setting_layers or key in setting_layers[-1].values
    return chain_of_key if is_own else [*chain_of_key, default]


def layers(overrides: Sequence[str]) -> tuple[list[Layer], Keys, Keys]:
    """Returns the layers over the defaults, in order, and by group the chosen option and that of conf/config.yaml."""
    words = with_model_option(overrides)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list("config", words, RunMode.RUN)
        usual = loader.compute_defaults_list("config", [], RunMode.RUN).overrides.known_choices
    files = [
        _of_file(default.config_path, default.package or "")
        for default in defaults.defaults
        if default.config_path and not default.config_path.startswith(("hydra/", "schema/"))
    ]
    values = {override.input_line for override in defaults.config_overrides}
    parsed = OverridesParser.create().parse_overrides(words)
    typed = [
        _of_override(override.key_or_group, override.value(), word)
        for override, word in zip(parsed, words, strict=True)
        if override.input_line in values
    ]
    choices = defaults.overrides.known_choices
    return [*files, *typed], dict(choices), {group: usual[group] for group in usual if isinstance(usual[group], str)}


def typed(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the override that sets each key."""
    parsed = OverridesParser.create().parse_overrides(allow_free_keys(overrides, RunConfig))
    return {
        key: word
        for override, word in zip(parsed, overrides, strict=True)
        for key in flat(override.value(), override.key_or_group)
    }


def flat(content: Any, prefix: str = "") -> Keys:
    """Returns nested mappings as dotted keys; an empty mapping is a value."""
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
    # The file's defaults list and Hydra's settings are not settings of ours.
    content = {name: value for name, value in content.items() if name not in ("defaults", "hydra")}
    lines = dict(_lines(yaml.compose(text)))
    group, _, _ = path.rpartition("/")
    overlay = group in OVERLAYS
    return Layer(
        by=group if overlay else "group" if group else "config",
        values={f"{prefix}{key}": value for key, value in flat(content).items()},
        places={f"{prefix}{key}": f"{_short(file)}:{lines[key]}" for key in flat(content)},
        group="" if overlay else group,
    )


def _of_override(key: str, value: Any, word: str) -> Layer:
    values = flat(value, key)
    return Layer(by="command line", values=values, places=dict.fromkeys(values, word))


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields the dotted key and the line, from 1, of each value in a YAML file."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = f"{prefix}{name.value}"
            yield key, name.start_mark.line + 1
            yield from _lines(value, f"{key}.")


def _default(key: str) -> Setting:
    """Returns the dataclass's default with its line, or that there is none."""
    owner, name = resolve_field(key, RunConfig)
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    value = field.default if field.default is not dataclasses.MISSING else ABSENT
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    file, lines = _fields(owner)
    return Setting(value=value, by="default", place=f"{_short(file)}:{lines[name]}")


@cache
def _fields(owner: type) -> tuple[Path, dict[str, int]]:
    """Returns a dataclass's file and the line of each field."""
    source, first = inspect.getsourcelines(owner)
    body = ast.parse("".join(source)).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign)]
    lines = {node.target.id: node.lineno + first - 1 for node in fields if isinstance(node.target, ast.Name)}
    return Path(inspect.getfile(owner)), lines


def _why_missing(target: str) -> str:
    if not target:
        return "plan --explain: name a setting or a group, e.g. --explain lora.rank or --explain train"
    return (
        unknown_key(target, RunConfig)
        or f"{target}: this configuration does not have it, because a part above it is null or not chosen"
    )


def _with_option(key: str, overrides: Sequence[str], group: str, option: str) -> str:
    """Returns the key's value if the group had another option."""
    others = [override for override in overrides if override.split("=")[0] != group]
    values = flat(OmegaConf.to_container(compose([*others, f"{group}={option}"]), resolve=True))
    return _shown(values.get(key, ABSENT))


def _set_by(setting: Setting) -> str:
    if setting.by == "default":
        return f"{'because there is no default' if setting.value is ABSENT else 'by the default'} ({setting.place})"
    return f"by the {setting.by} ({setting.place})"


def _shown(value: Any) -> str:
    if value is ABSENT or value == "???":
        return "no value"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _short(file: Path) -> str:
    """Returns the path from the checkout, or from where packages are installed."""
    return str(file.relative_to(PACKAGE.parent)) if file.is_relative_to(PACKAGE.parent) else str(file)


def _upwards(key: str) -> Iterator[str]:
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])
