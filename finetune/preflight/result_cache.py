"""A rehearsal that held is not repeated: the same base, rows, settings, code, packages and processor prove the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.cache import cache_folder
from finetune.environment import code
from finetune.run import fingerprint, to_jsonable, write_json

TEXT = "trained_text.txt"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def name_of(config: Any, inputs: dict[str, Any], ahead: Any) -> str:
    """Names a rehearsal by everything that decides what it finds.

    Args:
        config: The rehearse group.
        inputs: As `rehearse` gets them; live objects among them are made of the others.
        ahead: What the run will do; None where a caller brings no trainer.
    """
    groups = [to_jsonable(part) for part in ahead or () if not callable(part)]
    machine = [platform.machine(), platform.processor(), os.cpu_count()]
    content = [
        fingerprint(config, inputs),
        groups,
        code(),
        {package: version(package) for package in PACKAGES},
        machine,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def find(name: str) -> dict[str, Any] | None:
    """What such a rehearsal found; None where there was none that held."""
    with contextlib.suppress(OSError, ValueError):
        file = _file(name)
        if file.is_file():
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return kept
    return None


def keep(name: str, product: dict[str, Any], folder: Path) -> None:
    """Remembers a rehearsal in which every proof held. A cache that cannot be written costs the next one its time."""
    with contextlib.suppress(OSError):
        shutil.copyfile(folder / TEXT, _file(name).with_suffix(".txt"))
        write_json(_file(name), product)


def restore_text(name: str, folder: Path) -> None:
    """Puts the text that the first batch trains where a rehearsal would have written it."""
    with contextlib.suppress(OSError):
        shutil.copyfile(_file(name).with_suffix(".txt"), folder / TEXT)


def _file(name: str) -> Path:
    return cache_folder("rehearsals") / f"{name}.json"
