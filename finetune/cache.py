"""What is made once and used by every run: under ``FINETUNE_CACHE`` or the user's cache folder."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from finetune.console import log


def cache_folder(name: str) -> Path:
    """The folder of one kind of cached things, made if it is not there."""
    root = (
        os.environ.get("FINETUNE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
    )
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def exclusive(folder: Path, key: str, *, what: str) -> Iterator[None]:
    """Makes a cached thing while no other run makes the same; the second one waits, says so, and finds it made.

    The kernel drops the lock with the process that holds it, so a killed run leaves none behind.

    Args:
        folder: Of the cache; one that cannot be written is used without a lock, since nothing can be made there either.
        key: Names the thing.
        what: For the message, e.g. ``these data``.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(open(folder / f".{key}.lock", "w"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log("cache", f"another run is making {what} in {folder}; this one waits and uses them")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, remembered by path, size and time of change so that large files are read once.

    A memory that cannot be read or written costs a second reading and nothing else.
    """
    resolved = file.resolve()
    status = resolved.stat()
    key = hashlib.sha256(f"{resolved}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()
    memo: Path | None = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        memo = cache_folder("hashes") / f"{key}.json"
        if memo.is_file():
            return str(json.loads(memo.read_text())["sha256"])
    with open(resolved, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if memo is not None:
        partial = memo.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps({"file": str(resolved), "sha256": digest}))
            os.replace(partial, memo)
    return digest
