"""The distribution's name: on PyPI, ``finetune`` is another project's, so nothing here may install it."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
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
