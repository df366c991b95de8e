"""The command ``config``: what a setting is, what it may be, and what it is in each option."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from finetune.cli.command import Command, Invocation, Option
from finetune.console import log
from finetune.errors import EXIT_OK
from finetune.files import atomic_write_text


def _config(invocation: Invocation) -> int:
    """Prints one setting, those below a prefix, or one line for each of all."""
    from finetune.reference import find
    from finetune.reference.markdown import as_json, default_of, facts_of

    target = invocation.arguments[0] if invocation.arguments else ""
    found = find(target)
    if invocation.options["json"]:
        sys.stdout.write(json.dumps([as_json(entry) for entry in found], indent=2) + "\n")
        return EXIT_OK
    for entry in found:
        line = f"{entry.key}: {entry.type}; {default_of(entry)}"
        more = [*entry.about.split("\n\n"), *facts_of(entry)] if target else []
        log("config", *(text.replace("`", "") for text in [line, *more]))
    if not target:
        log("config", f"{len(found)} settings; more about one, or about a group: finetune config {found[0].key}")
    return EXIT_OK


def _write_schema(invocation: Invocation) -> int:
    """Writes the JSON schema of an experiment's file."""
    from finetune.reference import experiment_schema

    file = Path(invocation.options["schema"])
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(experiment_schema(), indent=1) + "\n")
    log("config", f"wrote {file}", "editors use it where the first line of an experiment's file is")
    sys.stdout.write(f"# yaml-language-server: $schema={file.resolve()}\n")
    return EXIT_OK


CONFIG = Command(
    "config", "what a setting is: type, default, allowed values, and its value in each option", _config,
    arguments=("[KEY]",), settings=(),
    options=(
        Option("json", "print one JSON document instead"),
        Option("schema", "write the JSON schema of an experiment's file, for editors", "FILE", run=_write_schema),
    ),
    example="finetune config lora.rank",
)  # fmt: skip
