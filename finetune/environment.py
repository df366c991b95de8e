"""Records what a run was made with: versions, commit, machine, placement. Environment variables may be secret."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import finetune
from finetune.config import RunConfig, to_yaml
from finetune.files import atomic_write_text
from finetune.hardware import Machine, Placement, place, probe
from finetune.jsonable import to_jsonable
from finetune.paths import CONF, PACKAGE
from finetune.run import write_json

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "hydra-core",
    "wandb",
    "numpy",
)


def describe(machine: Machine, placement: Placement) -> dict[str, Any]:
    """Returns the content of environment.json."""
    return {
        "finetune": finetune.__version__,
        "commit": commit(),
        "code": code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "versions": {package: package_version(package) for package in PACKAGES},
        "machine": to_jsonable(machine),
        "placement": to_jsonable(placement),
    }


def describe_here(config: RunConfig) -> dict[str, Any]:
    """Returns what environment.json would be if this configuration ran here and now."""
    machine = probe(config.hardware)
    return describe(machine, place(machine, config))


def write_record(folder: Path, config: RunConfig, *, overrides: Sequence[str], described: dict[str, Any]) -> None:
    """Writes what was asked for and what it runs with."""
    atomic_write_text(folder / "config.yaml", to_yaml(config))
    atomic_write_text(folder / "command.txt", " ".join(["python -m finetune", *overrides]) + "\n")
    write_json(folder / "overrides.json", list(overrides))
    write_json(folder / "environment.json", described)


def commit() -> str | None:
    """Returns this checkout's commit, marked ``-dirty`` where files differ; None outside a checkout."""
    root = Path(finetune.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def code() -> dict[str, str]:
    """Returns for each package a hash of what decides a run: Python and C++, and the shipped configuration."""
    packages: dict[str, Any] = {}
    for root, kinds in ((PACKAGE, (".py", ".cpp")), (CONF, (".yaml", ".jinja"))):
        for file in sorted(file for file in root.rglob("*") if file.suffix in kinds):
            package = "conf" if root == CONF else file.relative_to(root).parts[0].removesuffix(".py")
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            packages.setdefault(package, hashlib.sha256()).update(f"{file.relative_to(root)}:{content}".encode())
    return {package: digest.hexdigest()[:16] for package, digest in packages.items()}


def package_version(package: str) -> str | None:
    """Returns the installed version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
