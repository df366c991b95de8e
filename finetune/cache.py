"""Keeps results that every run shares, under ``FINETUNE_CACHE`` or the user's cache folder."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from finetune.console import log


def cache_folder(name: str) -> Path:
    """Returns the folder of one kind of cached results, and creates it if necessary."""
    root = (
        os.environ.get("FINETUNE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
    )
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def exclusive(folder: Path, key: str, *, what: str) -> Iterator[None]:
    """Holds a lock while one process creates a cached result; a second one logs that it waits, and then finds it.

    The kernel drops the lock with the process that holds it, so a killed run leaves none behind.

    Args:
        folder: The cache. One that cannot be written to is used without a lock, since nothing can be created there.
        key: Names the result.
        what: For the message, e.g. ``these data``.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(open(folder / f".{key}.lock", "w"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log("cache", f"another run is making {what} in {folder}; this run waits and then uses them")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_sha256(file: Path, *, reuse: bool = True) -> str:
    """Hashes a file's bytes.

    Args:
        reuse: Whether a hash from before is returned while path, size and modification time are the same, so that large
            files are read once. To find damage, say False: a damaged disk does not change the modification time.
    """
    if not reuse:
        with open(file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    resolved = file.resolve()
    status = resolved.stat()
    key = hashlib.sha256(f"{resolved}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()
    memo: Path | None = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        memo = cache_folder("hashes") / f"{key}.json"
        if memo.is_file():
            return str(json.loads(memo.read_text())["sha256"])
    digest = file_sha256(resolved, reuse=False)
    if memo is not None:
        partial = memo.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps({"file": str(resolved), "sha256": digest}))
            os.replace(partial, memo)
    return digest
