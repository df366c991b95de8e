"""Finds the option of the model group that belongs to ``model.name``: no model gets another one's dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from omegaconf import DictConfig, OmegaConf

CUSTOM = "custom"
"""The option without settings of its own: everything is read from the model's files."""


def compose_for_model(overrides: Sequence[str], folders: Sequence[Path]) -> tuple[DictConfig, list[str], str | None]:
    """Composes, and composes again with the option that ``model.name`` belongs to where another one was chosen.

    An experiment or ``model=`` chooses an option with its own name, dimensions, template and attention. Where
    ``model.name`` names another model, all of them are another model's: the option of that name takes its place, or
    `CUSTOM` where there is none. What the user or the experiment sets under ``model.`` stays.

    Args:
        overrides: As Hydra takes them.
        folders: The configuration's folders, each with one folder for every group.

    Returns:
        The configuration, the overrides that compose it, and one sentence where an option was replaced, else None.
    """
    config = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    chosen = str(config.hydra.runtime.choices.get("model"))
    name = None if OmegaConf.is_missing(config.model, "name") else str(config.model.name)
    words, sentence = list(overrides), None
    if name is not None and name != (own := option_name(chosen, folders)):
        option = option_of(name, folders) or CUSTOM
        if option != chosen:
            words = [*(word for word in words if word.partition("=")[0] != "model"), f"model={option}"]
            config = hydra_compose("config", overrides=words)
        if own is None and option != CUSTOM:
            sentence = f"model.name={name} is the model of model={option}, which gives its dimensions and settings"
        elif own is not None:
            source = f"those of model={option}" if option != CUSTOM else "the model's own files"
            sentence = (
                f"model.name={name} is not {own}, the model of model={chosen}: dimensions, template and the other "
                f"settings of the model are {source}"
            )
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    OmegaConf.set_struct(config, True)
    return config, words, sentence


def option_of(name: str, folders: Sequence[Path]) -> str | None:
    """Returns the first option of the model group with exactly this ``name``; None where there is none."""
    options = sorted({file.stem for folder in folders for file in (folder / "model").glob("[!_]*.yaml")})
    return next((option for option in options if option_name(option, folders) == name), None)


def option_name(option: str, folders: Sequence[Path]) -> str | None:
    """Returns the ``name`` that an option sets, itself or through its defaults; None where it leaves it open."""
    file = next((file for folder in folders if (file := folder / "model" / f"{option}.yaml").is_file()), None)
    content: Any = OmegaConf.load(file) if file else None
    if not isinstance(content, DictConfig):
        return None
    if "name" in content:
        return None if OmegaConf.is_missing(content, "name") else str(content.name)
    inherited = [entry for entry in content.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return next((name for entry in reversed(inherited) if (name := option_name(entry, folders))), None)
