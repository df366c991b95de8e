"""The manual is true: its commands are read and composed, its settings, links, imports and quoted messages exist."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli.bench import BENCHMARKS
from finetune.cli.command import parse
from finetune.cli.commands import COMMANDS as ALL
from finetune.cli.dispatch import find_command
from finetune.config import RunConfig, load
from finetune.config.fields import field_types
from finetune.config.other_names import OTHER_NAMES
from finetune.config.overrides import group_options, override_problems
from finetune.paths import CONF
from tests.fixtures.pages import blocks, commands, inline_code
from tests.fixtures.scripts import script

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HOOKS = script("docs_hooks")
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PLACEHOLDERS = re.compile(r"\.\.\.|<[^>]*>|\[[a-z ]*\]|WHAT|COMMAND|KEY|FILE|FOLDER|-h|--help|--version|--groups|-v")
OWN_EXPERIMENTS = ("+experiment=mine", "+experiment=x", "+experiment=<name>", "+experiment=NAME", "+debug=NAME")
"""Experiments that the reader has written."""


ASSIGNMENT = re.compile(r"(?:[a-z_]+\.)?[a-z_]+=[a-z0-9\[\].,/+_-]+$")
KNOWN = {*field_types(RunConfig), *(folder.name for folder in CONF.iterdir() if folder.is_dir())} - {
    "hydra",
    "experiment",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def group_of(setting: str) -> str:
    return setting.partition("=")[0].partition(".")[0]


@cache
def compose_once(overrides: tuple[str, ...]) -> None:
    """Composes and checks settings; a model takes the place of the one that a saved run or an experiment would give."""
    if any(not word.startswith(("run.name=", "run.root=")) for word in overrides):
        chosen = {"model", "model.name", "+experiment"} & {word.partition("=")[0] for word in overrides}
        load([*overrides, *([] if chosen else ["model.name=org/model"])])


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def test_pages_show_most_commands() -> None:
    shown = {words[0] for _, words in COMMANDS if words}
    assert shown >= {
        "init",
        "plan",
        "data",
        "preflight",
        "train",
        "merge",
        "eval",
        "export",
        "chat",
        "config",
        "convert",
    }
    assert len(COMMANDS) > 100


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_exist_and_their_settings_compose(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "stands for one")
    for words in commands(page):
        typed = [word for word in words if not PLACEHOLDERS.fullmatch(word) and "..." not in word]
        command, rest = find_command(typed)
        if len(typed) < len(words):  # the beginning of a command: its flags and settings are checked one by one
            flags = {f"--{option.name}" for option in command.options}
            assert not [word for word in rest if word.startswith("--") and word not in flags], words
            rest = [word for word in rest if "=" in word]
            assert not override_problems([word for word in rest if word not in OWN_EXPERIMENTS], RunConfig, [CONF]), (
                words
            )
            continue
        invocation = parse(command, rest)
        if command.settings is None and "--multirun" not in invocation.hydra_flags:
            compose_once(tuple(word for word in invocation.overrides if word not in OWN_EXPERIMENTS))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_in_the_text_of_a_page_exist(page: Path) -> None:
    """An assignment such as ``train.micro_batch=2``; several stand in one pair of backticks."""
    texts = [text.split() for text in inline_code(page)]
    settings = [
        word for words in texts if all(map(ASSIGNMENT.match, words)) for word in words if group_of(word) in KNOWN
    ]
    assert not override_problems([word for word in settings if "..." not in word], RunConfig, [CONF])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_experiments_in_a_page_are_experiments(page: Path) -> None:
    for language, text in blocks(page):
        if language == "yaml" and "# @package _global_" in text:
            assert yaml.safe_load(text).keys() <= {*field_types(RunConfig), "defaults"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_of_a_page_is_python_and_imports_what_exists(page: Path) -> None:
    for language, text in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("finetune"):
                module = importlib.import_module(str(node.module))
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_readme_is_short() -> None:
    """At most 1,000 words besides tables and code."""
    text = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    assert len(re.sub(r"\]\([^)]*\)", "]", prose).split()) <= 1000


def test_messages_of_troubleshooting_are_in_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"(?m)^### `(.+)`$", text)
    written = [
        node.value
        for file in sorted((ROOT / "finetune").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(messages) > 10
    assert not [message for message in messages if not any(message in value for value in written)]


def nav_pages(nav: Any) -> Iterator[str]:
    for item in nav.values() if isinstance(nav, dict) else nav:
        if isinstance(item, str):
            yield item
        else:
            yield from nav_pages(item)


def test_every_page_is_in_the_table_of_contents_once() -> None:
    pages = list(nav_pages(SITE["nav"]))
    written = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(pages) == sorted([*written, *HOOKS.PAGES])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_pages(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    generated = {(DOCS / path).resolve() for path in HOOKS.PAGES}
    paths = [(page.parent / target).resolve() for target in targets]
    assert not [str(path) for path in paths if not path.is_file() and path not in generated]


def test_generated_pages_name_what_the_code_has() -> None:
    pages = {path: page() for path, page in HOOKS.PAGES.items()}
    headings = re.findall(r"(?m)^## (.+)$", pages["reference/commands.md"])
    assert headings == [command.name for command in (*ALL, *BENCHMARKS)]
    options = re.findall(r"(?m)^\| `(\w+)` \|", pages["reference/options.md"])
    groups = re.findall(r"(?m)^## (.+)$", pages["reference/options.md"])
    assert options == [option for group in groups for option in group_options(group, [CONF])]
    assert all(f"`{name}`" in pages["reference/other-names.md"] for name in OTHER_NAMES)


@pytest.mark.slow  # the tests of links and of the table of contents are its fast guards
def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert 'id="lorarank"' in (tmp_path / "reference" / "settings" / "index.html").read_text(encoding="utf-8")
