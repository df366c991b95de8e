"""Composes a configuration with Hydra, checks it, and converts it to dataclasses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from finetune.config.fields import impossible_values
from finetune.config.model_option import compose_for_model
from finetune.config.overrides import (
    SEARCH_PATH,
    allow_free_keys,
    config_folders,
    misplaced_overlays,
    override_problems,
    translate_error,
    unknown_additions,
    with_own_folder,
)
from finetune.config.schema import RunConfig
from finetune.console import log
from finetune.errors import ConfigError
from finetune.paths import CONF, SHIPPED


def register() -> None:
    """Tells Hydra of the schema and of the ``shipped:`` resolver."""
    ConfigStore.instance().store(group="schema", name="run", node=RunConfig, package="_global_")
    OmegaConf.register_new_resolver("shipped", lambda name: str(SHIPPED / name), replace=True)


def load(overrides: Sequence[str]) -> RunConfig:
    """Composes, checks and types a configuration.

    Args:
        overrides: Hydra's overrides, e.g. ``["+experiment=llama7b_qlora", "lora.rank=8"]``.

    Raises:
        ConfigError: With every problem, not only the first.
    """
    return to_run_config(compose(overrides))


def compose(overrides: Sequence[str]) -> DictConfig:
    """Composes a configuration with Hydra.

    Raises:
        ConfigError: With every problem, not only the first.
    """
    config, _, sentence = _compose(overrides)
    if sentence:
        log("model", sentence, stream=sys.stderr)
    return config


def with_model_option(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides with the option of the model group that ``model.name`` belongs to; see `compose_for_model`.

    Raises:
        ConfigError: With every problem, not only the first.
    """
    return _compose(overrides)[1]


def _compose(overrides: Sequence[str]) -> tuple[DictConfig, list[str], str | None]:
    register()
    overrides = with_own_folder(allow_free_keys(overrides, RunConfig))
    folders = config_folders(overrides)
    problems = misplaced_overlays(overrides) or override_problems(overrides, RunConfig, folders)
    if problems:
        raise ConfigError(*problems)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            config, words, sentence = compose_for_model(overrides, folders)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(*_collect_override_errors(overrides, error, folders)) from error
        except YAMLError as error:
            raise ConfigError(
                f"a file of the configuration is not valid YAML: {' '.join(str(error).split())}"
            ) from error
    unknown = unknown_additions(config, RunConfig)
    if unknown:
        raise ConfigError(*unknown)
    return config, words, sentence


def to_run_config(config: DictConfig) -> RunConfig:
    """Converts a composed configuration to dataclasses and checks every rule.

    Raises:
        ConfigError: With every problem, not only the first.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(*[_missing(key) for key in missing])
        run_config = OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise as_config_error(error) from error
    assert isinstance(run_config, RunConfig)
    problems = list(impossible_values(run_config)) or list(run_config.problems())
    if problems:
        raise ConfigError(*problems)
    return run_config


def _missing(key: str) -> str:
    if key == "model.name":
        return (
            "no model is chosen: give model.name=<hub id, folder or .gguf file>, model=<option> (finetune --groups "
            "lists them), or +experiment=<name>, which chooses one"
        )
    return f"{key} has no value and no default; set it, e.g. {key}=..."


def as_config_error(error: Exception) -> ConfigError:
    """Returns an error of Hydra or OmegaConf that no single override causes, in our form."""
    return ConfigError(translate_error(error, None, None, RunConfig, [CONF]))


def to_yaml(config: RunConfig) -> str:
    """Returns the resolved configuration as the run folder keeps it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the resolved configuration as plain values, for trackers and manifests."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)  # type: ignore[return-value]


def _collect_override_errors(overrides: Sequence[str], first: Exception, folders: Sequence[Path]) -> list[str]:
    """Hydra stops at the first problem, so each override is tried alone on top of the group choices that work."""
    working = [override for override in overrides if override.startswith(f"{SEARCH_PATH}=")]
    choices = [override for override in overrides if "." not in override.split("=")[0]]
    settings = [override for override in overrides if override not in (*choices, *working)]
    try:
        config: DictConfig | None = hydra_compose("config", overrides=working)
    except (HydraException, OmegaConfBaseException):  # a file of the configuration is at fault, and no override
        config = None
    problems: list[str] = []
    for override in [*choices, *settings]:
        try:
            composed = hydra_compose("config", overrides=[*working, override])
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(translate_error(error, override, config, RunConfig, folders))
        else:
            if override in choices:
                working.append(override)
                config = composed
    return problems or [translate_error(first, None, None, RunConfig, folders)]
