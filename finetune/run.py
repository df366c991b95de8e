"""The run folder: each stage leaves its product there, and a stage that is done does not run again."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.console import log
from finetune.errors import ConfigError, DamagedProduct, FinetuneError
from finetune.files import atomic_write_text, file_hashes, find_damage, read_json, require_disk
from finetune.jsonable import flatten, from_json, to_jsonable
from finetune.memory import PeakMemory
from finetune.system_errors import as_system_error

IF_EXISTS = ("fail", "resume", "overwrite")
STAGES = ("plan", "data", "model", "preflight", "train", "merge", "eval", "export", "report")
SCHEMA = 3
"""Of manifest.json; raised when the meaning of its key changes, so that an older run is refused in a sentence."""

NOT_PRODUCT = ("checkpoints", "manifest.json")
"""Parts of a stage's folder that are not hashed with its product: checkpoints have hashes of their own."""

LONGEST_NAME_BYTES = 255
SMALLEST_FREE_DISK_BYTES = 64 * 1024**2

Product = TypeVar("Product")


@dataclass(kw_only=True, slots=True)
class RunSettings:
    """Names the run, and says what happens if it exists."""

    name: str
    """Folder under ``root``. Contains no time, since every process of a launch would read its own clock."""

    root: str = "outputs"
    """Folder of all runs, relative to the working directory."""

    seed: int
    """Of the split, the order of rows, the initial weights of the adapter and dropout."""

    if_exists: str
    """``fail``, ``resume`` (continue where it stopped) or ``overwrite`` (delete the run and start again)."""

    until: str = "report"
    """The last stage to run, e.g. ``data``."""

    def problems(self) -> Iterator[str]:
        if not self.name or "/" in self.name or self.name.startswith("."):
            yield f"run.name must be a plain folder name; got {self.name!r}"
        if (length := len(self.name.encode(errors="replace"))) > LONGEST_NAME_BYTES:
            yield f"run.name must have at most {LONGEST_NAME_BYTES} bytes, which file systems take; got {length}"
        if self.if_exists not in IF_EXISTS:
            yield f"run.if_exists must be one of {', '.join(IF_EXISTS)}; got {self.if_exists!r}"
        if self.until not in STAGES:
            yield f"run.until must be one of {', '.join(STAGES)}; got {self.until!r}"
        if self.seed < 0:
            yield f"run.seed must not be negative; got {self.seed}"
        if self.seed >= 2**32:
            yield f"run.seed must be below 2^32, which numpy's generators take; got {self.seed}"


class RunFolder:
    """``outputs/<run>``: one folder per stage, each with a manifest written last.

    Attributes:
        path: The run's folder.
        redo: Finished stages to run again.
    """

    def __init__(self, path: Path, *, redo: frozenset[str] = frozenset()) -> None:
        self.path = path
        self.redo = redo
        self._unverified: list[str] = []

    @classmethod
    def open(cls, config: RunSettings, *, redo: frozenset[str] = frozenset()) -> "RunFolder":
        """Opens or creates the folder, following ``run.if_exists``.

        Raises:
            ConfigError: The folder holds a run and ``if_exists`` is ``fail``, or the disk is full.
        """
        path = (Path(config.root) / config.name).resolve()
        if path.exists() and any(path.iterdir()) and not redo:
            if config.if_exists == "fail":
                raise ConfigError(
                    f"run.name: {path} holds a run already and nothing is written over it; choose another run.name, "
                    "or set run.if_exists=resume (continue) or run.if_exists=overwrite (delete it)"
                )
            if config.if_exists == "overwrite":
                with cls(path).lock():  # never while another process is working in it
                    shutil.rmtree(path)
        folder = cls(path, redo=redo)
        folder.make()
        return folder

    @classmethod
    def finished(cls, config: RunSettings, *, redo: frozenset[str] = frozenset()) -> frozenset[str]:
        """Returns the stages of a run that would be continued that are done and not to be redone; makes no folder."""
        if config.if_exists != "resume":
            return frozenset()
        folder = cls(Path(config.root) / config.name, redo=redo)
        return frozenset(stage for stage in STAGES if folder.is_done(stage))

    def make(self) -> None:
        """Creates the folder."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run.root: {self.path} cannot be created: {error.strerror}; choose another run.root"
            ) from error
        require_disk(self.path, SMALLEST_FREE_DISK_BYTES, "run.root: a run", error=ConfigError)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the run. The kernel releases the lock when the process ends, so a killed run leaves none."""
        file = self.path / ".lock"
        with open(file, "w", opener=_open_at_once) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not file.exists() or not os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                    raise BlockingIOError  # deleted and created again in between: the lock is on the deleted file
            except BlockingIOError as error:
                raise ConfigError(
                    f"run.name: another process works in {self.path}; wait for it, or choose another run.name"
                ) from error
            self._end_swaps()
            with _naming(self.path):
                yield

    def _end_swaps(self) -> None:
        """Finishes a `_swap` that was killed: deletes the earlier product, or restores it where no new one exists."""
        for old in self.path.glob(".*.old"):
            final = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
            if final.exists():
                shutil.rmtree(old)
            else:
                os.replace(old, final)
                log("run", f"{final} was restored: replacing it was interrupted")

    def is_done(self, stage: str) -> bool:
        """Returns whether a stage has finished and is not to be redone."""
        return self.manifest(stage) is not None and stage not in self.redo

    @contextmanager
    def timed_stage(self, stage: str) -> Iterator[dict[str, Any]]:
        """Measures time and memory of a stage that lives in memory; the yielded dict becomes its manifest."""
        facts: dict[str, Any] = {}
        started = time.monotonic()
        with PeakMemory(self.path / "memory.jsonl", stage=stage) as peak:
            yield facts
        (self.path / stage).mkdir(exist_ok=True)
        write_json(
            self.path / stage / "manifest.json", {"stage": stage, "product": to_jsonable(facts), **_cost(started, peak)}
        )

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """Returns the manifest of a finished stage; None where it has not finished."""
        file = self.path / stage / "manifest.json"
        return read_json(file, dict) if file.is_file() else None

    def stage(
        self, name: str, product_type: type[Product], make: Callable[[Path], Product], *, key: Mapping[str, Any]
    ) -> Product:
        """Runs ``make(folder)`` unless the stage is done already with the same key.

        Before anything is made, the files of earlier stages are hashed again: nothing is built upon damaged ones.

        Args:
            name: Of the stage and of its folder.
            product_type: A frozen dataclass whose ``folder`` is the stage's folder; its other fields are saved in
                ``manifest.json``, written last and atomically.
            make: Does the stage's work in a folder.
            key: Everything that changes the result, by names that a user knows; configs are compared setting by
                setting.

        Returns:
            The product, new or read back from the manifest.

        Raises:
            ConfigError: The stage is done with another key; the message names each changed entry with both values.
            DamagedProduct: A file of an earlier stage is not as it was when that stage ended.
        """
        flat_key = flatten(key)
        manifest = self.manifest(name)
        redo = name in self.redo
        if manifest is not None and not redo:
            if manifest.get("schema") != SCHEMA:
                raise ConfigError(
                    f"{self.path / name} was written by another version of finetune (manifest schema "
                    f"{manifest.get('schema', 1)}, this one reads {SCHEMA}); finish the run with that version, or "
                    "run.if_exists=overwrite to start again"
                )
            changes = _describe_changes(manifest["key"], flat_key)
            if changes:
                raise ConfigError(
                    f"{self.path / name} was made with other settings ({'; '.join(changes)}); choose another run.name, "
                    "or run.if_exists=overwrite to start again"
                )
            log(name, f"done before: {self.path / name} is used as it is")
            self._unverified.append(name)
            return self.product(name, product_type)
        self._verify()
        final = self.path / name
        folder = self.path / f".{name}.new" if manifest is not None else final
        if folder != final and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with PeakMemory(self.path / "memory.jsonl", stage=name) as peak:
            product = make(folder)
        fields = to_jsonable(product)
        fields.pop("folder")
        facts = {"schema": SCHEMA, "stage": name, "key": flat_key, "product": fields, **_cost(started, peak)}
        write_json(folder / "manifest.json", facts | {"files": file_hashes(folder, without=NOT_PRODUCT)})
        if folder != final:
            _swap(folder, final)
        return dataclasses.replace(product, folder=final)  # type: ignore[type-var]

    def _verify(self) -> None:
        """Hashes the files of stages that were done before, once in a process."""
        while self._unverified:
            name = self._unverified[0]
            damage = find_damage(self.path / name, (self.manifest(name) or {})["files"])
            if damage:
                raise DamagedProduct(
                    f"{damage}; restore the file, or make it again: delete {self.path / name}, and set "
                    "run.if_exists=resume"
                )
            self._unverified.pop(0)

    def product(self, name: str, product_type: type[Product]) -> Product:
        """Reads the product of a finished stage."""
        manifest = read_json(self.path / name / "manifest.json", dict)
        return from_json(product_type, {"folder": self.path / name, **manifest["product"]})


def fingerprint(content: Any) -> str:
    """Returns a hash of a value as JSON, without a product's ``folder``, so that a run may be moved."""
    plain = to_jsonable(content)
    if isinstance(plain, dict):
        plain.pop("folder", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Writes indented JSON atomically."""
    atomic_write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file, and refuses a pipe instead of waiting for its reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turns what libraries raise for a full disk and the like into errors of the system with a path."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # SQLite, safetensors, torch, tokenizers: each has a class of its own
        system_error = as_system_error(error, folder)
        if system_error is None:
            raise
        raise system_error from error


def _cost(started: float, peak: PeakMemory) -> dict[str, Any]:
    return {
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak.rss_bytes,
        "peak_device_bytes": peak.device_bytes,
    }


def _swap(work: Path, final: Path) -> None:
    """Replaces the earlier product of a stage; `RunFolder.lock` completes it after a kill in between."""
    old = final.with_name(f".{final.name}.old")
    os.replace(final, old)
    os.replace(work, final)
    shutil.rmtree(old)


def _describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
