"""Checks what the user typed against the groups and the schema, one sentence for each problem."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from finetune.config.fields import (
    dataclass_in,
    field_types,
    free_keys,
    resolve_field,
    resolve_type,
    unknown_key,
    value_problems,
)
from finetune.config.other_names import ABSENT
from finetune.paths import CONF

OVERLAYS = ("experiment", "debug")
"""Groups that are laid over the others and set keys of any of them."""

SEARCH_PATH = "hydra.searchpath"
"""Hydra's setting for more folders with groups; ``--config-dir`` is turned into it."""


def misplaced_overlays(overrides: Sequence[str]) -> list[str]:
    """Returns what is wrong with overlays: a missing plus, or ``+debug`` before the ``+experiment`` that undoes it."""
    keys = [override.partition("=")[0] for override in overrides]
    order = [key.lstrip("+") for key in keys]
    problems = [
        f"{override}: {key} is an overlay and needs a plus: write +{override}"
        for key, override in zip(keys, overrides, strict=True)
        if key in OVERLAYS
    ]
    if "experiment" in order and "debug" in order and order.index("debug") < order.index("experiment"):
        problems.append(
            "+debug stands before +experiment, so the experiment would undo it; write +experiment=... +debug=..."
        )
    return problems


def allow_free_keys(overrides: Sequence[str], schema: type) -> list[str]:
    """Adds the plus signs that Hydra needs before names of the user's own: ``data.columns={prompt: question}``."""
    free = [name for name in free_keys(schema) if "." in name]  # without a dot: a group, whose options name its entries
    return [_allow(override, free) for override in overrides]


def _allow(override: str, free: list[str]) -> str:
    key, equals, value = override.partition("=")
    for name in free:
        if key == name and equals:
            return f"++{override}" if value.strip() not in ("{}", "null") else override
        if key.startswith(f"{name}.") and equals:
            for part in reversed(key.removeprefix(f"{name}.").split(".")):
                value = f"{{{part}: {value}}}"
            return f"++{name}={value}"
    return override


def with_own_folder(overrides: Sequence[str]) -> list[str]:
    """Adds ``conf/`` of the working directory to the search path where it has experiments, so that
    ``+experiment=mine`` finds ``conf/experiment/mine.yaml``. An experiment that is shipped comes first."""
    own = Path.cwd() / "conf"
    if not (own / "experiment").is_dir() or own.resolve() == CONF.resolve():
        return list(overrides)
    places = [str(place).removeprefix("file://") for place in config_folders(overrides)[1:]]
    if str(own) in places:
        return list(overrides)
    paths = ",".join(f"'file://{place}'" for place in [*places, str(own)])
    return [*(word for word in overrides if word.partition("=")[0] != SEARCH_PATH), f"{SEARCH_PATH}=[{paths}]"]


def config_folders(overrides: Sequence[str]) -> list[Path]:
    """Returns the folders with groups: the shipped one, and those of ``hydra.searchpath``."""
    parser = OverridesParser.create()
    words = [word for word in overrides if word.partition("=")[0] == SEARCH_PATH]
    values: list[Any] = [parser.parse_override(word).value() for word in words]
    extra = [Path(str(place).removeprefix("file://")) for places in values for place in places]
    return [CONF, *extra]


def is_sweep(override: str) -> bool:
    """Returns whether an override gives several values, for ``--multirun``; False where it cannot be read."""
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False


def override_problems(overrides: Sequence[str], schema: type, folders: Sequence[Path]) -> list[str]:
    """Returns what is wrong with each override by itself: choices of groups first, then settings.

    Args:
        overrides: As Hydra takes them.
        schema: The dataclass of the whole configuration.
        folders: The configuration's folders, each with one folder for every group.
    """
    parser = OverridesParser.create()
    choices: list[str] = []
    settings: list[str] = []
    for word in overrides:
        try:
            override = parser.parse_override(word)
        except HydraException:
            settings.append(
                f"{word}: cannot be read as an override; write key=value, and quote values that hold spaces or signs"
            )
            continue
        if override.is_hydra_override():
            continue
        if any((folder / override.key_or_group).is_dir() for folder in folders):
            choices += _choice_problems(override, schema, folders)
        else:
            settings += _setting_problems(override, schema)
    return [*choices, *settings]


def unknown_additions(config: DictConfig, schema: type) -> list[str]:
    """Returns what is wrong with keys that the schema does not have: Hydra lets ``+lora.rnak=3`` add anything."""
    return [problem for key in _keys(config, schema) if (problem := unknown_key(key, schema))]


def translate_error(error: Exception, override: str | None, config: Any, schema: type, folders: Sequence[Path]) -> str:
    """Returns an error of Hydra or OmegaConf as where, rule, value, remedy.

    Args:
        error: What composing raised.
        override: The override that raised it; None where a file of the configuration did.
        config: What is composed without it, or None.
        schema: The dataclass of the whole configuration.
        folders: The configuration's folders.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return _no_option(group, option, folders)
    key = override.partition("=")[0].lstrip("+~") if override else ""
    if override and config is not None and not key.startswith("hydra"):
        parent = key.rpartition(".")[0]
        if override.startswith("+") and OmegaConf.select(config, key) is not None:
            return f"{override}: {key} is there already; write it without the plus"
        if parent and OmegaConf.select(config, parent) is None:
            return f"{override}: {parent} is null or not chosen in this configuration, so it holds no settings"
    cause = next((item for item in (error, error.__cause__) if isinstance(item, OmegaConfBaseException)), None)
    is_known = cause is not None and not isinstance(cause, InterpolationResolutionError) and cause.full_key
    if cause and is_known and (problem := _problem_at(str(cause.full_key), cause.value, schema)):
        return problem
    where = override or (cause and cause.full_key) or "configuration"
    return f"{where}: {' '.join(str((cause and cause.msg) or error).split())}"


def group_options(group: str, folders: Sequence[Path]) -> list[str]:
    """Returns the options of a group by name."""
    files = [file for folder in folders for file in (folder / group).glob("*.yaml")]
    return sorted({file.stem for file in files if not file.stem.startswith("_")})


def _problem_at(key: str, value: Any, schema: type) -> str | None:
    try:
        hint = resolve_type(key, schema)
    except KeyError:
        return unknown_key(key, schema)
    return next(value_problems(key, hint, value), None)


def _choice_problems(override: Override, schema: type, folders: Sequence[Path]) -> list[str]:
    if override.is_delete() or override.is_sweep_override():
        return []
    group, value = override.key_or_group, override.value()
    if isinstance(value, dict):
        return list(value_problems(group, resolve_type(group, schema), value))
    options = value if isinstance(value, list) else ["null" if value is None else value]
    available = group_options(group, folders)
    return [_no_option(group, str(option), folders) for option in options if option not in available]


def _setting_problems(override: Override, schema: type) -> list[str]:
    key = override.key_or_group
    is_value = not override.is_delete() and not override.is_sweep_override()
    if problem := unknown_key(key, schema, override.value() if is_value else ABSENT):
        return [problem]
    if override.is_delete():
        is_entry = key.rpartition(".")[2] != resolve_field(key, schema)[1]
        return [] if is_entry else [f"{override.input_line}: a setting cannot be removed; give it another value"]
    if override.is_sweep_override():
        text = str(override.input_line).partition("=")[2]
        return [f"{key}: {text} is several values, which need --multirun; a list is written [{text}]"]
    return list(value_problems(key, resolve_type(key, schema), override.value()))


def _no_option(group: str, option: str, folders: Sequence[Path]) -> str:
    options = group_options(group, folders) if group else []
    near = difflib.get_close_matches(option, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{group}={option}: there is no such option; choose one of {', '.join(options) or '(none)'}{hint}"


def _keys(config: DictConfig, schema: Any, prefix: str = "") -> Iterator[str]:
    hints = field_types(schema)
    for name in map(str, config):
        kind = dataclass_in(hints[name]) if name in hints else None
        is_open = OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name)
        node = None if is_open else config[name]
        if kind is None or not isinstance(node, DictConfig):
            yield f"{prefix}{name}"
        elif typing.get_origin(hints[name]) is dict:
            for option in map(str, node):
                yield from _keys(node[option], kind, f"{prefix}{name}.{option}.")
        else:
            yield from _keys(node, kind, f"{prefix}{name}.")
