"""The pages of the manual that come from the code, for mkdocs: settings, options, commands, names in other tools.

``make docs`` builds the site. The pages are written while it is built and are not in the repository.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cli.bench import BENCHMARKS
from finetune.cli.commands import COMMANDS
from finetune.cli.help import about
from finetune.config.other_names import OTHER_NAMES
from finetune.config.overrides import group_options
from finetune.paths import CONF
from finetune.reference import page as settings_page

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
OPTIONS = """# Options of the groups

`GROUP=OPTION` chooses the option of a group, `+experiment=NAME` and `+debug=NAME` lay one over all groups. Each is
a file `conf/GROUP/OPTION.yaml`; files in `conf/` of the working directory, or of `--config-dir`, are found too.
"""
OTHER_NAMES_HEAD = """# Names in other tools

Settings of transformers, TRL, peft, axolotl and LLaMA-Factory. A name of theirs on the command line is an error
that names the setting here, with the value converted; [`finetune convert`](../howto/migrate.md) translates files.

| here | there | what differs |
|---|---|---|"""


def commands_page() -> str:
    """Returns the help of every command."""
    lines = ["# Commands", "", "What `finetune COMMAND --help` prints. `finetune` alone names the first steps.", ""]
    for command in [*COMMANDS, *BENCHMARKS]:
        lines += [f"## {command.name}", "", "```text", about(command).rstrip(), "```", ""]
    return "\n".join(lines)


def options_page() -> str:
    """Returns a table of options for each group, each with the comment at the top of its file."""
    lines = [OPTIONS]
    for group in sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"):
        lines += [f"## {group}", "", "| option | |", "|---|---|"]
        lines += [
            f"| `{option}` | {_first_comment(CONF / group / f'{option}.yaml')} |"
            for option in group_options(group, [CONF])
        ]
        lines.append("")
    return "\n".join(lines)


def other_names_page() -> str:
    """Returns the table of names in other tools, by setting here."""
    by_setting: dict[str, list[str]] = {}
    for name, other in OTHER_NAMES.items():
        by_setting.setdefault(other.setting, []).append(name)
    rows = []
    for setting, names in sorted(by_setting.items()):
        rules = dict.fromkeys(OTHER_NAMES[name].rule for name in names if OTHER_NAMES[name].rule)
        rows.append(f"| `{setting}` | {', '.join(f'`{name}`' for name in names)} | {'; '.join(rules)} |")
    return "\n".join([OTHER_NAMES_HEAD, *(row.replace("<", "&lt;") for row in rows), ""])


def root_page(name: str) -> str:
    """Returns a page of the repository's top folder; its links to ``docs/`` become links inside the manual."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/settings.md": settings_page,
    "reference/options.md": options_page,
    "reference/other-names.md": other_names_page,
    "contributing.md": lambda: root_page("CONTRIBUTING.md"),
    "changelog.md": lambda: root_page("CHANGELOG.md"),
}
"""By path below ``docs/``."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages; mkdocs calls this by its name."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files


def _first_comment(file: Path) -> str:
    """Returns the comment that a file begins with, after the line that names its package."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            found.append(line.lstrip("# "))
    return " ".join(found).replace("|", "\\|").replace("<", "&lt;")
