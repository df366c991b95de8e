"""What ``data.path``, ``data.hub`` and ``data.sources`` mean: files in a fixed order, each with a name and a hash."""

import glob
import hashlib
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.console import log
from finetune.data import files
from finetune.data.config import DataConfig, SourceConfig
from finetune.errors import DataError

SPLIT_NAMES = ("train", "test", "valid", "validation", "val", "dev", "eval", "heldout")
LISTED = 6
HASH_BLOCK_BYTES = 1 << 22
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file or hub data set, ready to be read.

    Attributes:
        name: How the ledger calls it; short, and different for every source of a run.
        path: The file, or None for the hub.
        mix: Name of the entry of ``data.sources`` that it belongs to, or "".
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
    mix: str
    heldout: bool

    def rows(self, limit: int | None) -> Iterator[files.Raw]:
        raw = files.rows(self.path, text_unit=self.text_unit) if self.path else hub_rows(self)
        return islice(raw, limit)

    def title(self) -> str:
        """For readers elsewhere: nothing of this machine's folders."""
        version = f" at {self.revision}" if self.hub and self.revision else ""
        return f"{self.name}{version}{' (held out)' if self.heldout else ''}"

    def digest(self) -> str:
        """Hash of the bytes; for the hub, of the name and the revision that was read."""
        if self.path is None:
            return hub_digest(self)
        hasher = hashlib.sha256()
        try:
            with open(self.path, "rb") as handle:
                while block := handle.read(HASH_BLOCK_BYTES):
                    hasher.update(block)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}; check the name and the rights") from error
        return hasher.hexdigest()


def resolve(config: DataConfig) -> list[Source]:
    """All sources, training rows first.

    Raises:
        DataError: A path matches nothing.
    """
    entries = config.sources or {
        "": SourceConfig(path=config.path, hub=config.hub, revision=config.revision, split=config.split)
    }
    found: list[Source] = []
    for mix, entry in entries.items():
        where = f"data.sources.{mix}.path" if mix else "data.path"
        found += _resolve_one(config, entry, mix=mix, where=where, heldout=False)
    if config.heldout_path:
        heldout = SourceConfig(path=config.heldout_path)
        found += _resolve_one(config, heldout, mix="", where="data.heldout_path", heldout=True)
    _refuse_shared(found)
    return _named(found)


def _resolve_one(config: DataConfig, entry: SourceConfig, *, mix: str, where: str, heldout: bool) -> list[Source]:
    base = Source(
        name="", path=None, hub=entry.hub, revision=entry.revision or config.revision, split=entry.split or config.split,
        streaming=config.streaming, format=entry.format or config.format, columns=dict(entry.columns or config.columns),
        text_unit=config.text_unit, mix=mix, heldout=heldout,
    )  # fmt: skip
    if entry.path is None:
        return [replace(base, name=str(entry.hub))]
    paths = [
        path for part in entry.path.split(",") if part.strip() for path in _expand(part.strip(), where, base.split)
    ]
    return [replace(base, path=path, name=path.name) for path in dict.fromkeys(paths)]


def _expand(part: str, where: str, split: str) -> list[Path]:
    path = Path(part).expanduser()
    if path.is_dir():
        return _folder(path, where, split)
    if path.exists():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    usable = [match for match in matches if match.is_file()]
    if not usable:
        near = _near(path)
        raise DataError(
            f"{where}: {part} does not exist{near}; give a file, a folder or a glob, relative to {Path.cwd()}"
        )
    return usable


def _folder(path: Path, where: str, split: str) -> list[Path]:
    """A folder's data files; where they are named by split, only the asked split's."""
    inside = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    data = [file for file in inside if files.kind_of(file) in files.SUFFIXES and not _about(file)]
    if not data:
        raise DataError(f"{where}: the folder {path} holds no data file; known kinds are {', '.join(files.SUFFIXES)}")
    mine = [file for file in data if _split_of(file.relative_to(path)) == split]
    if mine and len(mine) < len(data):
        left = [file for file in data if file not in mine]
        log("data", f"{path}: read {_listed(mine, path)} because data.split={split}; left out {_listed(left, path)}")
        return mine
    kinds = {files.kind_of(file) for file in data}
    if ".txt" in kinds and len(kinds) > 1:
        data = [file for file in data if files.kind_of(file) not in (".txt", ".text", ".md")]
    return data


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _about(file: Path) -> bool:
    """Files that tell of the data, as hubs and ``datasets.save_to_disk`` lay them beside it."""
    return file.stem.upper() in ("README", "LICENSE") or file.name in (
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
    )


def _listed(paths: list[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in paths]
    return f"{', '.join(names[:LISTED])}{f' and {len(names) - LISTED:,} more' if len(names) > LISTED else ''}"


def _split_of(file: Path) -> str:
    """By the file's name or its innermost folder's that says one (``train/data-00000-of-00001.arrow``)."""
    for part in (file.name.lower().split(".")[0], *(folder.lower() for folder in reversed(file.parts[:-1]))):
        for name in SPLIT_NAMES:
            if part == name or part.startswith((f"{name}-", f"{name}_")):
                return name
    return ""


def _near(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f" (nor does the folder {path.parent})"
    close = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _refuse_shared(sources: list[Source]) -> None:
    training = {source.path.resolve() for source in sources if source.path and not source.heldout}
    for source in sources:
        if source.heldout and source.path and source.path.resolve() in training:
            raise DataError(
                f"data.heldout_path: {source.path} is among the training files too; held-out rows must be others"
            )


def _named(sources: list[Source]) -> list[Source]:
    """File names, with as many folders in front as it takes to tell them apart."""
    names = [source.name for source in sources]
    for depth in range(2, max((len(source.path.parts) for source in sources if source.path), default=0) + 1):
        shared = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(source.path.parts[-depth:]) if source.path and name in shared else name
            for source, name in zip(sources, names, strict=True)
        ]
    return [replace(source, name=name) for source, name in zip(sources, names, strict=True)]


def hub_rows(source: Source) -> Iterator[files.Raw]:
    """Rows of a hub data set, numbered from 1.

    Raises:
        DataError: The hub, the name, the revision or the split cannot be had.
    """
    return enumerate(
        hub_dataset(str(source.hub), revision=source.revision, split=source.split, streaming=source.streaming), 1
    )


@lru_cache(maxsize=16)
def hub_dataset(name: str, *, revision: str | None, split: str, streaming: bool) -> Any:
    """Asks the hub once per data set, however often its rows are looked at."""
    import datasets

    try:
        return datasets.load_dataset(name, revision=revision, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data.hub={name} revision={revision or 'main'} split={split} cannot be had: {reason}; "
            "check the name and the network, or download the files and give data.path=<file>"
        ) from error


def hub_digest(source: Source) -> str:
    """The loaded data set's fingerprint, which follows the commit; a stream has none, so it is only as fixed as its revision."""
    if not source.streaming:
        dataset = hub_dataset(str(source.hub), revision=source.revision, split=source.split, streaming=False)
        return hashlib.sha256(repr((source.hub, source.split, dataset._fingerprint)).encode()).hexdigest()
    commit = source.revision if source.revision and COMMIT.fullmatch(source.revision) else uuid.uuid4().hex
    return hashlib.sha256(repr((source.hub, source.split, commit)).encode()).hexdigest()
