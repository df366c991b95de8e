"""Resolves ``data.path``, ``data.hub`` and ``data.sources`` to files in a fixed order, each with a name and a hash."""

import glob
import hashlib
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.cache import file_sha256
from finetune.console import log
from finetune.data import files
from finetune.data.arrow_rows import unpad
from finetune.data.config import DataConfig, SourceConfig
from finetune.data.limit_config import LimitConfig
from finetune.errors import DataError
from finetune.files import first_error_line

SPLIT_NAMES = ("train", "test", "valid", "validation", "val", "dev", "eval", "heldout")
LISTED = 6
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file or hub data set, ready to be read.

    Attributes:
        name: Its name in the ledger; short and unique within a run.
        path: The file, or None for the hub.
        mix: Its entry of ``data.sources``, or "".
    """

    name: str
    path: Path | None
    hub: str | None
    revision: str | None
    split: str
    streaming: bool
    format: str
    columns: dict[str, str] = field(default_factory=dict)
    text_unit: str
    limits: LimitConfig
    mix: str
    heldout: bool

    def rows(self, limit: int | None, changes: Counter[str] | None = None) -> Iterator[files.Raw]:
        """Yields the first ``limit`` rows, or all; ``changes`` receives what was changed in reading, by kind."""
        changes = Counter() if changes is None else changes
        if self.path:
            rows = files.rows(self.path, text_unit=self.text_unit, changes=changes, limits=self.limits)
            return islice(rows, limit)
        return islice(((number, unpad(row, changes)) for number, row in hub_rows(self)), limit)

    def title(self) -> str:
        """Returns a name for readers on other machines, without folders."""
        version = f" at {self.revision}" if self.hub and self.revision else ""
        return f"{self.name}{version}{' (held out)' if self.heldout else ''}"

    def digest(self) -> str:
        """Hashes the bytes; for the hub, the name and the revision that was read."""
        if self.path is None:
            return hub_digest(self)
        try:
            return file_sha256(self.path, reuse=False)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}; check its name and permissions") from error


def resolve_sources(config: DataConfig) -> list[Source]:
    """Returns all sources, those of training rows first.

    Raises:
        DataError: A path matches nothing, or there is none.
    """
    if not (config.path or config.hub or config.sources):
        raise DataError(
            "data: no rows are named; set one of data.path=<file, folder or glob>, data.hub=<org/name> and data.sources"
        )
    entries = config.sources or {
        "": SourceConfig(path=config.path, hub=config.hub, revision=config.revision, split=config.split)
    }
    sources: list[Source] = []
    for mix, entry in entries.items():
        where = f"data.sources.{mix}.path" if mix else "data.path"
        sources += _resolve_entry(config, entry, mix=mix, where=where, heldout=False)
    if config.heldout_path:
        heldout = SourceConfig(path=config.heldout_path)
        sources += _resolve_entry(config, heldout, mix="", where="data.heldout_path", heldout=True)
    _check_separate(sources)
    return _with_unique_names(sources)


def _resolve_entry(config: DataConfig, entry: SourceConfig, *, mix: str, where: str, heldout: bool) -> list[Source]:
    source = Source(
        name=str(entry.hub),
        path=None,
        hub=entry.hub,
        revision=entry.revision or config.revision,
        split=entry.split or config.split,
        streaming=config.streaming,
        format=entry.format or config.format,
        columns=dict(entry.columns or config.columns),
        text_unit=config.text_unit,
        limits=config.limits,
        mix=mix,
        heldout=heldout,
    )
    if entry.path is None:
        return [source]
    whole = Path(entry.path).expanduser().exists()  # then its commas are part of its name
    parts = [entry.path] if whole else [part.strip() for part in entry.path.split(",") if part.strip()]
    paths = [path for part in parts for path in _expand(part, where, source.split)]
    return [replace(source, path=path, name=path.name) for path in dict.fromkeys(paths)]


def _expand(part: str, where: str, split: str) -> list[Path]:
    path = Path(part).expanduser()
    if path.is_dir():
        return _folder(path, where, split)
    if path.is_file():
        return [path]
    if path.exists():
        raise DataError(f"{where}: {part} is a pipe or a device, which may never end; write the rows to a file")
    matches = sorted(Path(match) for match in glob.glob(_pattern(path), recursive=True))
    matching_files = [match for match in matches if match.is_file()]
    if not matching_files:
        hint = _did_you_mean(path)
        raise DataError(
            f"{where}: {part} does not exist{hint}; give a file, a folder or a glob, relative to {Path.cwd()}"
        )
    return matching_files


def _pattern(path: Path) -> str:
    """Returns a glob in which the folders that exist stand for themselves, whatever characters they have."""
    parent = next((parent for parent in path.parents if parent.exists()), Path())
    rest = path.relative_to(parent) if parent != Path() else path
    return str(Path(glob.escape(str(parent))) / rest)


def _folder(path: Path, where: str, split: str) -> list[Path]:
    """Returns a folder's data files; where their names contain splits, only those of ``split``."""
    inside = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    data = [file for file in inside if files.file_kind(file) in files.SUFFIXES and not _is_description(file)]
    if not data:
        known = ", ".join(files.SUFFIXES)
        raise DataError(f"{where}: the folder {path} contains no data file; known types are {known}")
    of_split = [file for file in data if _split_of(file.relative_to(path)) == split]
    if of_split and len(of_split) < len(data):
        others = _list_files([file for file in data if file not in of_split], path)
        log("data", f"{path}: read {_list_files(of_split, path)} because data.split={split}; not read: {others}")
        return of_split
    kinds = {files.file_kind(file) for file in data}
    if ".txt" in kinds and len(kinds) > 1:
        data = [file for file in data if files.file_kind(file) not in (".txt", ".text", ".md")]
    return data


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _is_description(file: Path) -> bool:
    """Returns whether a file describes the data, as hubs and ``datasets.save_to_disk`` add them."""
    names = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
    return file.stem.upper() in ("README", "LICENSE") or file.name in names


def _list_files(paths: list[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in paths]
    return f"{', '.join(names[:LISTED])}{f' and {len(names) - LISTED:,} more' if len(names) > LISTED else ''}"


def _split_of(file: Path) -> str:
    """Reads the split from the file's name, or from the innermost folder (``train/data-00000-of-00001.arrow``)."""
    for part in (file.name.lower().split(".")[0], *(folder.lower() for folder in reversed(file.parts[:-1]))):
        for name in SPLIT_NAMES:
            if part == name or part.startswith((f"{name}-", f"{name}_")):
                return name
    return ""


def _did_you_mean(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f", and neither does the folder {path.parent}"
    close = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _check_separate(sources: list[Source]) -> None:
    training = {source.path.resolve() for source in sources if source.path and not source.heldout}
    for source in sources:
        if source.heldout and source.path and source.path.resolve() in training:
            raise DataError(f"data.heldout_path: {source.path} is also a training file; name a file of other rows")


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Adds as many folders to file names as are necessary to make them unique."""
    names = [source.name for source in sources]
    for depth in range(2, max((len(source.path.parts) for source in sources if source.path), default=0) + 1):
        shared = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(source.path.parts[-depth:]) if source.path and name in shared else name
            for source, name in zip(sources, names, strict=True)
        ]
    return [replace(source, name=name) for source, name in zip(sources, names, strict=True)]


def hub_rows(source: Source) -> Iterator[files.Raw]:
    """Returns the rows of a hub data set, numbered from 1.

    Raises:
        DataError: The hub cannot be reached, or has no such data set, revision or split.
    """
    name, revision = str(source.hub), source.revision
    return enumerate(hub_dataset(name, revision=revision, split=source.split, streaming=source.streaming), 1)


@lru_cache(maxsize=16)
def hub_dataset(name: str, *, revision: str | None, split: str, streaming: bool) -> Any:
    """Loads a data set from the hub once, even if its rows are read several times."""
    import datasets

    try:
        return datasets.load_dataset(name, revision=revision, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.hub={name} revision={revision or 'main'} split={split} cannot be loaded: {first_error_line(error)}; "
            "check the name and the network, or download the files and set data.path=<file>"
        ) from error


def hub_digest(source: Source) -> str:
    """Hashes the data set's fingerprint, which depends on the commit; a stream has none, so its revision is hashed."""
    if not source.streaming:
        dataset = hub_dataset(str(source.hub), revision=source.revision, split=source.split, streaming=False)
        return hashlib.sha256(repr((source.hub, source.split, dataset._fingerprint)).encode()).hexdigest()
    commit = source.revision if source.revision and COMMIT.fullmatch(source.revision) else uuid.uuid4().hex
    return hashlib.sha256(repr((source.hub, source.split, commit)).encode()).hexdigest()
