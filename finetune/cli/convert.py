"""The command ``convert``: an experiment from a training file of another tool."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.cli.command import Command, Invocation, Option
from finetune.config import load
from finetune.console import log
from finetune.errors import EXIT_OK, ConfigError
from finetune.files import atomic_write_text
from finetune.paths import CONF

FOLDER = Path("conf") / "experiment"


def experiment_file(name: str, *, command: str) -> Path:
    """Returns ``conf/experiment/<name>.yaml`` of the working directory.

    Raises:
        ConfigError: The name is not one of an experiment, or an experiment has it.
    """
    if not re.fullmatch(r"\w[\w-]*", name):
        raise ConfigError(f"{command} --name must be letters, digits, _ and -; got {name!r}")
    for file in (FOLDER / f"{name}.yaml", CONF / "experiment" / f"{name}.yaml"):
        if file.is_file():
            raise ConfigError(f"{command}: {file} exists and is not written over; choose another --name")
    return FOLDER / f"{name}.yaml"


def _convert(invocation: Invocation) -> int:
    """Writes the experiment, and prints what was translated and what was not."""
    from finetune.convert import experiment_text, read_file, translate

    source = Path(invocation.arguments[0])
    name = invocation.options["name"] or re.sub(r"[^\w-]", "_", source.stem)
    target = experiment_file(name, command="convert")
    translation = translate(read_file(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target, experiment_text(translation, name=name))
    log(
        "convert",
        f"{source} ({translation.file.tool}): {len(translation.translated)} settings translated, "
        f"{len(translation.unneeded)} need no counterpart, {len(translation.missing)} not translated",
        *(f"not translated: {key}: {reason}" for key, _, reason in translation.missing),
        f"wrote {target}",
    )
    load([f"+experiment={name}"])
    log("convert", f"next: finetune plan +experiment={name}")
    return EXIT_OK


CONVERT = Command(
    "convert", "an experiment from a training file of axolotl, LLaMA-Factory or TRL", _convert, arguments=("FILE",),
    settings=(), options=(Option("name", "name of the experiment; that of the file by default", "NAME"),),
    example="finetune convert qlora.yml",
)  # fmt: skip
