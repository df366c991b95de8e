"""Decides what of a model is opened: weights as safetensors only, code only in files that the user named by hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune.errors import ModelError

CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
"""Files in which ``auto_map`` may name code."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def remote_code_problems(files: Mapping[str, str], *, revision: str | None) -> Iterator[str]:
    """Yields what is wrong with ``model.remote_code``.

    Args:
        files: Its value.
        revision: The commit on the hub; None for a local folder.
    """
    for file, digest in files.items():
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            yield f"model.remote_code: {file} needs its SHA-256 (64 hex digits); got {digest!r}"
    if files and revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        yield (
            "model.remote_code runs code from the hub, so model.revision must pin it to a commit (40 hex digits); "
            f"got {revision}"
        )


def check_weights(folder: Path) -> None:
    """Refuses a base without safetensors.

    Raises:
        ModelError: There are none, or only pickles.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        raise ModelError(
            f"model.name: {folder} holds {pickles[0]}, a pickle, which can run code when it is loaded; "
            "convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    raise ModelError(
        f"model.name: {folder} holds no *.safetensors file, so there are no weights to load; pickles (*.bin, *.pt) are "
        "not fetched from a hub: convert them where you trust them, then give model.name=<folder>"
    )


def check_remote_code(folder: Path, files: Mapping[str, str]) -> None:
    """Refuses a folder whose code is not what the user named. Must run before transformers opens the folder.

    Args:
        folder: The base.
        files: Names and SHA-256 of all its Python files. Empty: no code may run, so nothing is checked.

    Raises:
        ModelError: A file is missing, changed or not named, or the code is in another repository.
    """
    if not files:
        return
    present = hashes(folder)
    wrong = [f"{name} is missing" for name in files if name not in present]
    wrong += [
        f"{name} has hash {present[name]}, not {digest}"
        for name, digest in files.items()
        if name in present and present[name] != digest
    ]
    wrong += [f"{name} is not named" for name in present if name not in files]
    wrong += [f"{target} is in another repository" for target in code_of(folder) if "--" in target]
    if wrong:
        raise ModelError(
            f"model.remote_code: the code in {folder} is not what was named, and none of it has run: "
            f"{'; '.join(wrong)}. Read it, then name it: {setting(folder)}"
        )


def hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each Python file below a folder. Never cached: a file may change and keep its times."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.py"))
    }


def code_of(folder: Path) -> list[str]:
    """Returns what ``auto_map`` names: ``module.Class``, or ``org/repository--module.Class``."""
    names: list[str] = []
    for name in CONFIGS:
        file = folder / name
        entries = json.loads(file.read_text(encoding="utf-8")).get("auto_map", {}) if file.is_file() else {}
        for value in entries.values() if isinstance(entries, dict) else [entries]:
            names += [item for item in (value if isinstance(value, list) else [value]) if item]
    return names


def setting(folder: Path) -> str:
    """Returns the override that names the code as it is."""
    files = ", ".join(f"{name}: '{digest}'" for name, digest in hashes(folder).items())
    return f'"model.remote_code={{{files}}}"'


def offer(folder: Path) -> str:
    """Returns how to let a model's own code run, for an error message; empty where it has none."""
    if not code_of(folder):
        return ""
    return f". It comes with its own code, which does not run unless you name it after reading it: {setting(folder)}"
