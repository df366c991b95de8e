"""Reuses prepared data whose sources, template, tokenizer, settings and code are the same."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from finetune.cache import file_sha256
from finetune.chat_templates import ChatTemplate
from finetune.console import log
from finetune.data.config import DataConfig
from finetune.data.sources import Source
from finetune.errors import DamagedProduct
from finetune.files import find_damage, read_json
from finetune.run import write_json

PATHS = ("path", "heldout_path")
"""Settings whose files are hashed instead of their names."""

UNFINISHED = ".new-"
KEPT_SECONDS = 24 * 3600
"""No process takes longer to copy its result; what is older was left by one that was killed."""


def cache_key(
    config: DataConfig,
    sources: list[Source],
    *,
    tokenizer: str,
    template: ChatTemplate | None,
    extra: dict[str, Any],
    seed: int,
) -> str:
    """Returns the hash that names a preparation's result before it is made."""
    hasher = hashlib.sha256()
    content = {name: value for name, value in config.key().items() if name not in PATHS}
    described = [(source.name, source.mix, source.heldout, source.digest()) for source in sources]
    content_and_code = [content, described, template, extra, seed, package_hash()]
    hasher.update(json.dumps(content_and_code, sort_keys=True).encode())
    hasher.update(tokenizer.encode())
    return hasher.hexdigest()


def package_hash() -> str:
    """Hashes this package's source files."""
    hasher = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


def restore(root: Path, key: str, folder: Path) -> dict[str, Any] | None:
    """Copies a cached result into ``folder`` and returns its product; None without one, or if a file has changed."""
    cached = root / key
    record = cached / "product.json"
    if not record.is_file():
        return None
    try:
        content = read_json(record, dict)
        damage = find_damage(cached, content["files"])
    except (DamagedProduct, KeyError) as error:
        damage = str(error)
    if damage:
        log("data", f"the cache is damaged, so all data are prepared again: {damage}")
        shutil.rmtree(cached)
        return None
    for name in content["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        shutil.copyfile(cached / name, folder / name)
    return content["product"]


def save(root: Path, key: str, folder: Path, product: dict[str, Any]) -> None:
    """Copies a result into the cache; if that fails, logs why, since the run needs no cache.

    The last step is a rename, so a reader sees all of it or nothing. What killed processes left is deleted.
    """
    work = root / f"{UNFINISHED}{key[:24]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{UNFINISHED}*"):
            if left == work or time.time() - left.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(left)
        _copy(folder, work, product)
        os.rename(work, root / key)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        log("data", f"not cached for the next run, because data.cache={root} cannot be written: {error.strerror}")


def _copy(folder: Path, work: Path, product: dict[str, Any]) -> None:
    written = (file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
    names = sorted(str(file.relative_to(folder)) for file in written)
    for name in names:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, work / name)
    record = {"product": product, "files": {name: file_sha256(work / name, reuse=False) for name in names}}
    write_json(work / "product.json", record)
