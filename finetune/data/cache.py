"""Reuses prepared data whose sources, template, tokenizer, settings and code are the same."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from finetune.cache import file_sha256
from finetune.chat_templates import ChatTemplate
from finetune.console import log
from finetune.data.config import DataConfig
from finetune.data.sources import Source

PATHS = ("path", "heldout_path")
"""Settings whose files are hashed instead of their names."""


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
    content = json.loads(record.read_text())
    for name, digest in content["files"].items():
        file = cached / name
        if not file.is_file() or file_sha256(file, reuse=False) != digest:
            log("data", f"the cached {file} has changed since it was written, so all data are prepared again")
            shutil.rmtree(cached)
            return None
    for name in content["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        shutil.copyfile(cached / name, folder / name)
    return content["product"]


def save(root: Path, key: str, folder: Path, product: dict[str, Any]) -> None:
    """Copies a result into the cache. The last step is a rename, so a reader sees all of it or nothing."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    except OSError as error:
        log("data", f"not cached for the next run, because data.cache={root} cannot be written: {error.strerror}")
        return
    written = (file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
    names = sorted(str(file.relative_to(folder)) for file in written)
    for name in names:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, work / name)
    record = {"product": product, "files": {name: file_sha256(work / name, reuse=False) for name in names}}
    (work / "product.json").write_text(json.dumps(record))
    with contextlib.suppress(OSError):  # another process was faster; its result is the same
        os.rename(work, root / key)
    shutil.rmtree(work, ignore_errors=True)
