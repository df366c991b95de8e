"""From the words of the command line to an exit code."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Sequence

from finetune.cli import help as help_texts
from finetune.cli.command import Command, parse
from finetune.cli.commands import COMMANDS
from finetune.cli.hydra_flags import run_with_hydra
from finetune.console import print_error
from finetune.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, ConfigError, FinetuneError
from finetune.system_errors import explain


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done; 2 the user can fix it; 1 our fault or the machine's; 75 stopped by a signal after saving. An error that
        is not ours comes up with its traceback, unless it is of the disk or the system.
    """
    if threading.current_thread() is threading.main_thread():
        # TERM ends the program as INT does, until training handles both.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr: names in rows may hold half a character
    try:
        return dispatch(list(sys.argv[1:] if argv is None else argv))
    except FinetuneError as error:
        return print_error(error, error.exit_code)
    except OSError as error:
        message = explain(error)
        if message is None:
            raise
        return print_error(message, EXIT_FAILURE)
    except KeyboardInterrupt:
        return print_error("stopped; continue with run.if_exists=resume", EXIT_INTERRUPTED)


def dispatch(words: list[str]) -> int:
    """Finds the command, prints help where it was asked for, and runs it."""
    command, rest = find_command(words)
    if not words:
        sys.stdout.write(help_texts.FIRST_STEPS)
    elif {"--help", "-h"} & set(rest):
        sys.stdout.write(help_texts.about(command) if len(rest) < len(words) else help_texts.overview())
    elif "--version" in rest:
        sys.stdout.write(help_texts.versions())
    elif "--groups" in rest:
        help_texts.print_groups()
    else:
        invocation = parse(command, rest)
        return run_with_hydra(invocation) if invocation.hydra_flags else invocation.handler()(invocation)
    return EXIT_OK


def find_command(words: list[str]) -> tuple[Command, list[str]]:
    """Returns the command that the first words name, ``run`` where they name none, and the words after it.

    Raises:
        ConfigError: The first word is neither a command nor a setting.
    """
    by_name = {command.name: command for command in COMMANDS}
    if not words or words[0].startswith(("-", "~")) or "=" in words[0]:
        return by_name["run"], words
    if words[0] not in by_name:
        raise ConfigError(help_texts.unknown_command(words[0]))
    command, rest = by_name[words[0]], words[1:]
    for subcommand in command.subcommands:
        if rest and subcommand.name == f"{command.name} {rest[0]}":
            return subcommand, rest[1:]
    return command, rest
