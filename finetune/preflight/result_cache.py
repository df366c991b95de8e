"""Remembers preflights that passed, by base, rows, settings, code, packages and processor, so that none is repeated."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cache import cache_folder
from finetune.environment import code
from finetune.jsonable import from_json, to_jsonable
from finetune.products import PreflightResult
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


def find(name: str) -> PreflightResult | None:
    """Returns the result of an earlier preflight that passed, or None."""
    with contextlib.suppress(OSError, ValueError):
        file = _file(name)
        if file.is_file():
            return from_json(PreflightResult, json.loads(file.read_text(encoding="utf-8")))
    return None


def remember(name: str, result: PreflightResult) -> None:
    """Remembers a preflight that passed. Where the cache cannot be written, the next run repeats the checks."""
    with contextlib.suppress(OSError):
        shutil.copyfile(result.folder / TEXT, _file(name).with_suffix(".txt"))
        write_json(_file(name), to_jsonable(result))


def restore_text(name: str, folder: Path) -> None:
    """Copies the text that the first batch trains on to where a preflight writes it."""
    with contextlib.suppress(OSError):
        shutil.copyfile(_file(name).with_suffix(".txt"), folder / TEXT)


def _file(name: str) -> Path:
    return cache_folder("preflights") / f"{name}.json"
