"""What ``--help``, ``--version`` and ``--groups`` print."""

from __future__ import annotations

import difflib
from importlib.metadata import PackageNotFoundError, version

import finetune
from finetune.cli.command import Command
from finetune.cli.commands import COMMANDS
from finetune.config.overrides import group_options
from finetune.console import log
from finetune.paths import CONF

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
OVERVIEW = """\
finetune [command] [key=value ...] [--flags]

{commands}

Examples
  finetune plan +experiment=llama7b_qlora --fit
  finetune +experiment=quickstart lora.rank=8 run.name=first
  finetune data model.name=org/model data.path=rows.jsonl --why rows.jsonl:137

Settings
  key=value is always a setting; +experiment=NAME sets many at once (--groups lists them).
  finetune --cfg job        every setting with its value, and --groups the options to choose from
  finetune config KEY       what a setting is and may be; finetune plan --explain KEY says who set it

Flags of every command
  --help, --version, --groups, --config-dir FOLDER; Hydra's --cfg, --info, --multirun, --shell-completion, --hydra-help
"""

FIRST_STEPS = """\
finetune: QLoRA fine-tuning, from a memory plan to a tested export

  make quickstart                                          a demo on any machine: tunes a 135M model, in minutes
  finetune plan model.name=org/model data.path=rows.jsonl  what your own model and rows need; no weights are fetched
  finetune run +experiment=qwen25_7b_qlora run.name=mine data=custom data.path=rows.jsonl
  finetune --help                                          all commands and settings
"""
"""What the program prints where it is given nothing at all."""


def overview() -> str:
    """Returns the help of the whole program, on one screen."""
    return OVERVIEW.format(commands="\n".join(f"  {command.name:<11}{command.summary}" for command in COMMANDS))


def about(command: Command) -> str:
    """Returns the help of one command."""
    usage = [
        f"finetune {command.name}",
        *(["WHAT ..."] if command.subcommands else command.arguments),
        *([] if command.settings == () else ["[key=value ...]"]),
        *(f"[--{option.name}{' ' if option.value else ''}{option.value}]" for option in command.options),
    ]
    lines = [_wrapped(usage), "", f"  {command.summary}"]
    if command.settings:
        lines.append(f"  settings: {', '.join(command.settings)}")
    flags = [(f"--{option.name} {option.value}".rstrip(), _option_line(option)) for option in command.options]
    flags += [(item.name.removeprefix(f"{command.name} "), item.summary) for item in command.subcommands]
    if flags:
        width = max(len(flag) for flag, _ in flags) + 2
        lines += ["", *(f"  {flag:<{width}}{text}" for flag, text in flags)]
    more = f"finetune {command.name} WHAT --help" if command.subcommands else "finetune --help"
    lines += ["", f"  e.g.  {command.example}", f"  more: {more}"]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """Returns this project's version and those of the libraries that decide a result."""
    return "\n".join([f"finetune {finetune.__version__}", *(f"{name} {_version(name)}" for name in LIBRARIES)]) + "\n"


def print_groups() -> None:
    """Prints every group of the configuration with its options."""
    groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")
    for group in groups:
        log(group, ", ".join(group_options(group, [CONF])))


def unknown_command(word: str) -> str:
    """Returns why a word is not a command, with the nearest one."""
    names = [command.name for command in COMMANDS]
    near = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean finetune {near[0]}?" if near else f"the commands are {', '.join(names)}"
    return f"{word}: not a command, and not a setting (write key=value); {hint}"


def _option_line(option: object) -> str:
    about, default = getattr(option, "about", ""), getattr(option, "default", None)
    return f"{about}; {default} by default" if default not in (None, "", []) else about


def _wrapped(words: list[str]) -> str:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 100:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
