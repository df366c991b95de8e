"""Writes files completely or not at all, and checks that the disk has room for them."""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from finetune.cache import file_sha256
from finetune.console import human_bytes
from finetune.errors import DamagedProduct, FinetuneError

Content = TypeVar("Content", dict, list)

WEIGHTS = ".safetensors"
"""Files that are large and that their stage has hashed already."""


def atomic_write_text(file: Path, text: str | Iterable[str]) -> None:
    """Writes next to the file, then renames: a reader sees the old content or the new one, never a part.

    Args:
        text: The whole content, or its pieces in order.
    """
    partial = file.with_name(f"{file.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as handle:
            handle.writelines([text] if isinstance(text, str) else text)
            handle.flush()
            os.fsync(handle.fileno())  # a power cut must not leave the new name with a part of the content
    except OSError as error:  # errors of writing name no file
        partial.unlink(missing_ok=True)
        error.filename = error.filename or str(file)
        raise
    os.replace(partial, file)


def read_json(
    file: Path, kind: type[Content], *, remedy: str = "delete it and run the stage that wrote it again"
) -> Content:
    """Reads JSON that a run wrote.

    Args:
        kind: What the file holds: dict or list.

    Raises:
        DamagedProduct: It is not JSON, or of another kind.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedProduct(f"{file} is damaged ({error}); {remedy}") from error
    if not isinstance(content, kind):
        raise DamagedProduct(f"{file} is damaged (it holds a {type(content).__name__}); {remedy}")
    return content


def require_disk(
    folder: Path,
    need_bytes: float,
    purpose: str,
    *,
    remedy: str = "free some space, or choose another run.root",
    error: type[Exception] = FinetuneError,
) -> None:
    """Refuses to start what the disk cannot hold.

    Args:
        purpose: Who needs the space, as the subject of the message: ``export.gguf``.
        error: Class to raise.

    Raises:
        FinetuneError: ``folder``'s disk has less than ``need_bytes`` free.
    """
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise error(
            f"{purpose} needs {human_bytes(need_bytes)} of disk space in {folder} and {human_bytes(free)} are free; "
            f"{remedy}"
        )


def file_hashes(folder: Path, *, without: Collection[str] = ()) -> dict[str, str]:
    """Returns the SHA-256 of every file of a folder by its path in it.

    Args:
        without: Files and folders at the top that are left out.
    """
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        str(file): file_sha256(folder / file, reuse=file.suffix == WEIGHTS)
        for file in files
        if file.parts[0] not in without
    }


def find_damage(folder: Path, hashes: Mapping[str, str]) -> str | None:
    """Returns which file of a folder is not as it was, with both hashes; None where all are. Every byte is read."""
    for path, then in hashes.items():
        file = folder / path
        now = file_sha256(file, reuse=False) if file.is_file() else "missing"
        if now != then:
            return f"{file} was changed since it was written: its SHA-256 was {then} and is {now}"
    return None


def first_error_line(error: BaseException, *, characters: int = 160) -> str:
    """Returns the first line of an error's message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:characters]


def link_or_copy(file: Path, target: Path) -> None:
    """Links a file that is large and never written to; copies it where links are impossible."""
    try:
        os.link(file, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(file, target)


def existing_parent(path: Path) -> Path:
    """Returns the path, or its nearest parent that exists: where its disk is found before it is made."""
    absolute = path.expanduser().absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())
