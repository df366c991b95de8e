"""Records what a run was made with: versions, commit, machine, placement. Environment variables may be secret."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import finetune
from finetune.hardware import Machine, Placement
from finetune.paths import CONF, PACKAGE
from finetune.run import to_jsonable

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


def environment(machine: Machine, placement: Placement) -> dict[str, Any]:
    """Returns the content of environment.json."""
    return {
        "finetune": finetune.__version__,
        "commit": commit(),
        "code": code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "versions": {package: _version(package) for package in PACKAGES},
        "machine": to_jsonable(machine),
        "placement": to_jsonable(placement),
    }


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
