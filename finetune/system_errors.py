"""Explains errors of the operating system: what failed where, and what to free or change.

Example::

    try:
        write(folder)
    except Exception as error:
        raise as_system_error(error, folder) or error
"""

import errno
import os
import re
from pathlib import Path

NO_SPACE = "free some space there, or choose another folder: run.root for runs, FINETUNE_CACHE for the cache, TMPDIR"
NO_RIGHTS = "change its permissions, or choose another folder: run.root for runs, FINETUNE_CACHE for the cache"
REMEDIES = {
    errno.ENOSPC: NO_SPACE,
    errno.EDQUOT: NO_SPACE,
    errno.EFBIG: "files may only be that large here: raise the limit (ulimit -f), or choose another folder (run.root)",
    errno.EROFS: NO_RIGHTS,
    errno.EACCES: NO_RIGHTS,
    errno.EPERM: NO_RIGHTS,
    errno.EMFILE: "let a process open more files: ulimit -n 65536",
    errno.ENFILE: "let the system open more files (sysctl fs.file-max), or end other processes",
    errno.ENOENT: "it was deleted or moved meanwhile: put it back, or make it again",
    errno.ENOTDIR: "move the file that stands where a folder has to be",
    errno.EISDIR: "move the folder that stands where a file has to be",
    errno.ENOTEMPTY: "another process writes there: wait for it, or choose another run.name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENXIO: "it is a pipe where a file has to be: delete it",
    errno.EIO: "the disk or its network failed: check it, or choose another run.root",
    errno.ESTALE: "the disk or its network failed: check it, or choose another run.root",
}
"""What a user can do, by number of the error."""

OF_PATHS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG)
"""Errors that say nothing without the path, which a text may not name."""

NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
"""How Python and Rust write such an error, in the output of another process or in a library's own error."""

TEXTS = {
    r"\d+ requested and \d+ written": errno.ENOSPC,  # numpy's tofile
    "database or disk is full": errno.ENOSPC,  # SQLite
    "disk I/O error": errno.EIO,
    "unable to open database file": errno.EACCES,
    "attempt to write a readonly database": errno.EROFS,
    "PytorchStreamWriter failed writing file|unexpected pos": errno.ENOSPC,  # torch.save
}
"""How libraries say that a file cannot be written."""


def as_system_error(error: Exception, folder: Path) -> OSError | None:
    """Returns the error of the system that an exception is, or tells of, with a path; None for any other.

    Args:
        folder: Is named where the error names no file, as those of writing do.
    """
    number = error.errno if isinstance(error, OSError) and error.errno else _number(str(error))
    if number not in REMEDIES:
        return None
    path = error.filename if isinstance(error, OSError) else None
    return OSError(number, os.strerror(number), str(folder) if path is None else path)


def explain(error: OSError) -> str | None:
    """Returns one message, with the path and what to free or change; None where there is nothing to advise."""
    if error.errno not in REMEDIES:
        return None
    path = "a file" if error.filename is None else error.filename
    return f"{path}: {error.strerror}; {REMEDIES[error.errno]}; a run continues with run.if_exists=resume"


def _number(text: str) -> int | None:
    match = NUMBER.search(text)
    if match and (number := int(match.group(1) or match.group(2))) not in OF_PATHS:
        return number
    return next((number for pattern, number in TEXTS.items() if re.search(pattern, text)), None)
