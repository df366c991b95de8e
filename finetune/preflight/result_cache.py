"""A rehearsal that held is not repeated: the same base, rows, settings, code, packages and processor prove the same."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cache import cache_folder
from finetune.environment import code
from finetune.run import fingerprint, write_json

if TYPE_CHECKING:
    from finetune.preflight.config import PreflightConfig
    from finetune.trainable import TrainingJob

TEXT = "trained_text.txt"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def name_of(config: PreflightConfig, job: TrainingJob, *, until: str) -> str:
    """Names a preflight by everything that decides its result."""
    trainable = job.trainable
    content = {
        "preflight": config,
        "data": job.data.fingerprint,
        "spec": trainable.spec.key(),
        "lora": trainable.lora,
        "kernels": trainable.fusion.choice,
        "train": job.config,
        "optim": job.optim,
        "seed": job.seed,
        "until": until,
        "code": code(),
        "packages": {package: version(package) for package in PACKAGES},
        "machine": [platform.machine(), platform.processor(), os.cpu_count()],
    }
    return fingerprint(content)[:32]


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
    return cache_folder("preflights") / f"{name}.json"
