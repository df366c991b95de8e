"""Prepared data by content: the same bytes, template, tokenizer, settings and code are not worked through twice."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.console import log
from finetune.data.config import DataConfig
from finetune.data.sources import Source
from finetune.run import to_jsonable

NOT_CONTENT = ("cache", "workers", "path", "heldout_path", "preview_rows")
"""Settings that change where or how fast, not what. Paths count by what their files hold."""


def key(
    config: DataConfig, sources: list[Source], *, tokenizer: str, template: str | None, extra: dict[str, Any], seed: int
) -> str:
    """Names the result of a preparation before it is made."""
    hasher = hashlib.sha256()
    content = {name: value for name, value in to_jsonable(config).items() if name not in NOT_CONTENT}
    described = [(source.name, source.mix, source.heldout, source.digest()) for source in sources]
    # A template that writes today's date gives other tokens tomorrow.
    today = datetime.now(UTC).date().isoformat() if template and "strftime_now" in template else ""
    hasher.update(json.dumps([content, described, template, extra, seed, today, code()], sort_keys=True).encode())
    hasher.update(tokenizer.encode())
    return hasher.hexdigest()


def code() -> str:
    """Hash of this room's sources."""
    hasher = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


def restore(root: Path, key: str, folder: Path) -> dict[str, Any] | None:
    """Brings a kept result into ``folder``; None where there is none or it has been tampered with."""
    kept = root / key
    record = kept / "product.json"
    if not record.is_file():
        return None
    content = json.loads(record.read_text())
    for name, digest in content["files"].items():
        file = kept / name
        if not file.is_file() or _digest(file) != digest:
            log("data", f"the cached {file} is not what was written, so everything is prepared again")
            shutil.rmtree(kept)
            return None
    for name in content["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        shutil.copyfile(kept / name, folder / name)
    return content["product"]


def credit(config: Any) -> None:
    """Reads every setting, so that none counts as unread: what comes from the cache was prepared with these."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for part in value.values() if isinstance(value, dict) else [value]:
            if dataclasses.is_dataclass(part):
                credit(part)


def keep(root: Path, key: str, folder: Path, product: dict[str, Any]) -> None:
    """Copies a result into the cache; the last step is a rename, so a reader sees all of it or none."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    except OSError as error:
        log("data", f"not kept for the next start, because data.cache={root} cannot be written: {error.strerror}")
        return
    files = sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"
    )
    for name in files:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, work / name)
    record = {"product": product, "files": {name: _digest(work / name) for name in files}}
    (work / "product.json").write_text(json.dumps(record))
    with contextlib.suppress(OSError):  # another process was faster; its result is the same
        os.rename(work, root / key)
    shutil.rmtree(work, ignore_errors=True)


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
