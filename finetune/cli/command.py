"""What a command is, and how its words are read: flags belong to the command, ``key=value`` is a setting."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.overrides import SEARCH_PATH
from finetune.errors import ConfigError

HYDRA_FLAGS = {
    "--cfg": 1, "-c": 1, "--resolve": 0, "--package": 1, "-p": 1, "--info": 1, "-i": 1, "--multirun": 0, "-m": 0,
    "--shell-completion": 0, "-sc": 0, "--hydra-help": 0,
}  # fmt: skip
"""Hydra's own flags, with the number of values that each takes."""

CONFIG_DIR = ("--config-dir", "-cd")
COMMON_FLAGS = (*HYDRA_FLAGS, *CONFIG_DIR, "--help", "-h", "--version", "--groups")


@dataclass(frozen=True, slots=True)
class Option:
    """A flag of a command, e.g. ``--explain KEY``.

    Attributes:
        name: Without the dashes.
        about: One line for the help.
        value: Name of its value in the help; empty for a flag that is on or off.
        convert: Reads the value; raises a ValueError with the rule.
        default: Where the flag is not given.
        run: Runs instead of the command where the flag is given; it then excludes the other flags.
        settings: The settings that `run` takes; None for all.
        short: A letter that stands for the name, e.g. ``-v``.
    """

    name: str
    about: str
    value: str = ""
    convert: Callable[[str], Any] = str
    default: Any = None
    run: Callable[[Invocation], int] | None = None
    settings: tuple[str, ...] | None = None
    short: str = ""

    @property
    def key(self) -> str:
        """Its name in `Invocation.options`."""
        return self.name.replace("-", "_")

    @property
    def initial(self) -> Any:
        """Its value where the flag is not given."""
        return self.default if self.value else False


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the table.

    Attributes:
        name: What is typed, e.g. ``plan`` or ``bench speed``.
        summary: One line for the help.
        run: Does it and returns the exit code.
        options: Its flags.
        arguments: Names of the words that it needs besides flags and settings; one in brackets may be left out.
        settings: The settings that it takes; None for all.
        distributed: Several processes share the work where ``launch`` says so; other commands are one process's.
        redo_from: First stage that is done again, with those that build on it, in a run that exists.
        preview: Stops after the stage of its name, in a folder of its own, so that the run's name stays free.
        subcommands: Commands whose names begin with this one's.
        example: One line for the help.
    """

    name: str
    summary: str
    run: Callable[[Invocation], int]
    options: tuple[Option, ...] = ()
    arguments: tuple[str, ...] = ()
    settings: tuple[str, ...] | None = None
    distributed: bool = False
    redo_from: str | None = None
    preview: bool = False
    subcommands: tuple[Command, ...] = ()
    example: str = ""


@dataclass(frozen=True, slots=True)
class Invocation:
    """A command line, read.

    Attributes:
        command: Which command.
        arguments: Its words that are neither flags nor settings.
        overrides: Settings, as Hydra takes them.
        options: Values of the command's flags by `Option.key`, defaults included.
        hydra_flags: Hydra's own flags with their values.
    """

    command: Command
    arguments: list[str]
    overrides: list[str]
    options: dict[str, Any]
    hydra_flags: list[str]

    def handler(self) -> Callable[[Invocation], int]:
        """Returns what runs: the command, or the flag that stands in its place."""
        option = self._replacement()
        return option.run if option and option.run else self.command.run

    def setting_values(self) -> dict[str, str]:
        """Returns the settings that were typed by key."""
        return dict(override.lstrip("+").split("=", 1) for override in self.overrides if "=" in override)

    def problems(self) -> Iterator[str]:
        """Yields what does not fit together."""
        name, option = self.command.name, self._replacement()
        if option:
            others = [other.name for other in self.given() if other is not option]
            if others:
                yield f"{name} --{option.name} stands alone; leave out {', '.join(f'--{other}' for other in others)}"
            name = f"{name} --{option.name}"
        allowed = option.settings if option else self.command.settings
        if allowed is not None:
            useless = [word for word in self.overrides if word.lstrip("+").partition("=")[0] not in allowed]
            if useless:
                takes = f"it takes {', '.join(allowed)}" if allowed else "it takes no settings"
                yield f"{name}: {' '.join(useless)} would have no effect; {takes}"
        wanted = self.command.arguments
        needed = sum(not name.startswith("[") for name in wanted)
        if not needed <= len(self.arguments) <= len(wanted) and not self.hydra_flags:
            got = " ".join(self.arguments) or "nothing"
            yield f"{name} needs {' '.join(wanted)}, e.g. {self.command.example}; got {got}"

    def given(self) -> list[Option]:
        """Returns the flags that have other values than their defaults."""
        return [option for option in self.command.options if self.options[option.key] != option.initial]

    def _replacement(self) -> Option | None:
        return next((option for option in self.given() if option.run), None)


def parse(command: Command, words: Sequence[str]) -> Invocation:
    """Reads the words after a command's name.

    Raises:
        ConfigError: With every problem: unknown flags, missing or wrong values, words that are neither.
    """
    known = {f"--{option.name}": option for option in command.options}
    known |= {f"-{option.short}": option for option in command.options if option.short}
    options = {option.key: option.initial for option in command.options}
    arguments: list[str] = []
    overrides: list[str] = []
    hydra_flags: list[str] = []
    problems: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        if flag in HYDRA_FLAGS:
            takes_next = HYDRA_FLAGS[flag] and not equals and _is_value(waiting)
            hydra_flags += [word, waiting.pop(0)] if takes_next else [word]
        elif flag in CONFIG_DIR or (flag in known and known[flag].value):
            if not equals and not _is_value(waiting, settings=True):
                problems.append(f"{command.name} {flag} needs a value, e.g. {flag} {_metavar(known.get(flag))}")
                continue
            text = value if equals else waiting.pop(0)
            if flag in CONFIG_DIR:
                problems += [] if Path(text).is_dir() else [f"{flag} {text}: there is no such folder"]
                overrides.append(f"{SEARCH_PATH}=['file://{Path(text).resolve()}']")
                continue
            try:
                options[known[flag].key] = known[flag].convert(text)
            except ValueError as error:
                problems.append(f"{command.name} {flag} {error}; got {text!r}")
        elif flag in known:
            options[known[flag].key] = True
            problems += [f"{command.name} {flag} takes no value; write {flag}"] if equals else []
        elif word.startswith("-"):
            problems.append(unknown_flag(flag, command))
        elif f"--{flag}" in known and equals:
            problems.append(f"{word}: not a setting, but a flag of {command.name}; write --{flag}{_shown(value)}")
        elif equals or word.startswith("~"):
            overrides.append(word)
        elif command.arguments:
            arguments.append(word)
        else:
            problems.append(f"{word}: not a setting (write key=value) and not a command, which would stand first")
    invocation = Invocation(command, arguments, overrides, options, hydra_flags)
    problems = problems or list(invocation.problems())
    if problems:
        raise ConfigError(*problems)
    return invocation


def unknown_flag(flag: str, command: Command) -> str:
    """Returns why a flag is not one of a command's, with the nearest one."""
    flags = [*(f"--{option.name}" for option in command.options), *COMMON_FLAGS]
    near = difflib.get_close_matches(flag, flags, n=1)
    hint = f"did you mean {near[0]}?" if near else f"`finetune {command.name} --help` lists them"
    return f"{flag}: not a flag of finetune {command.name}; {hint}"


def whole_number(text: str) -> int:
    """Reads a whole number above 0."""
    value = positive_number(text)
    if not value.is_integer():
        raise ValueError("must be a whole number")
    return int(value)


def count(text: str) -> int:
    """Reads a whole number of 0 or more."""
    return 0 if text == "0" else whole_number(text)


def positive_number(text: str) -> float:
    """Reads a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError("must be a positive number")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    """Returns a reader of one of several words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be {' or '.join(choices)}")
        return text

    return read


def names(text: str) -> list[str]:
    """Reads names between commas."""
    return [name for name in text.split(",") if name]


def _is_value(waiting: list[str], *, settings: bool = False) -> bool:
    """Whether the next word can be a flag's value: not a flag and, where settings are not values, not a setting."""
    return bool(waiting) and not waiting[0].startswith("-") and (settings or "=" not in waiting[0])


def _shown(value: str) -> str:
    return "" if value in ("true", "false") else f" {value}"


def _metavar(option: Option | None) -> str:
    return option.value if option else "FOLDER"
