"""The run folder: where every stage leaves its product, and how a stage that is done is not done again."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.console import human_bytes, log
from finetune.errors import ConfigError
from finetune.memory import PeakMemory

IF_EXISTS = ("fail", "resume", "overwrite")
STAGES = ("plan", "data", "model", "preflight", "train", "merge", "eval", "export", "report")
SMALLEST_FREE_DISK_BYTES = 64 * 1024**2

Product = TypeVar("Product")


@dataclass(kw_only=True, slots=True)
class RunSettings:
    """Which run this is, and what to do where one of that name stands already."""

    name: str
    """Folder under ``root``. Never holds the time: every process of a launch would read its own clock."""

    root: str = "outputs"
    """Where runs live, relative to the working directory."""

    seed: int
    """Seeds the split, the order of rows, the adapter's first weights and dropout."""

    if_exists: str
    """``fail``, ``resume`` (go on where it stopped) or ``overwrite`` (start again; the old run is deleted)."""

    until: str = "report"
    """The last stage to run, e.g. ``data``."""

    def problems(self) -> Iterator[str]:
        if not self.name or "/" in self.name or self.name.startswith("."):
            yield f"run.name must be a plain folder name; got {self.name!r}"
        if self.if_exists not in IF_EXISTS:
            yield f"run.if_exists must be one of {', '.join(IF_EXISTS)}; got {self.if_exists!r}"
        if self.until not in STAGES:
            yield f"run.until must be one of {', '.join(STAGES)}; got {self.until!r}"
        if self.seed < 0:
            yield f"run.seed must not be negative; got {self.seed}"


class RunFolder:
    """``outputs/<run>``: one folder per stage, each with a manifest written last.

    Attributes:
        path: The run's folder.
        again: Stages that run although they are done, because the user asked for that very stage.
    """

    def __init__(self, path: Path, *, again: frozenset[str] = frozenset()) -> None:
        self.path = path
        self.again = again

    @classmethod
    def open(cls, config: RunSettings, *, again: frozenset[str] = frozenset()) -> "RunFolder":
        """Opens or makes the folder, following ``run.if_exists``.

        Raises:
            ConfigError: The folder holds a run and ``if_exists`` is ``fail``, or the disk is full.
        """
        path = (Path(config.root) / config.name).resolve()
        if path.exists() and any(path.iterdir()) and not again:
            if config.if_exists == "fail":
                raise ConfigError(
                    f"run.name: {path} holds a run already and nothing is written over it; choose another run.name, "
                    "or say run.if_exists=resume (go on) or run.if_exists=overwrite (delete it)"
                )
            if config.if_exists == "overwrite":
                with cls(path).lock():  # never under the hands of a run that is still going
                    shutil.rmtree(path)
        folder = cls(path, again=again)
        folder.make()
        return folder

    def make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run.root: {self.path} cannot be made: {error.strerror}; choose another run.root"
            ) from error
        free = shutil.disk_usage(self.path).free
        if free < SMALLEST_FREE_DISK_BYTES:
            raise ConfigError(
                f"run.root: the disk of {self.path} has {human_bytes(free)} left and a run needs at least "
                f"{human_bytes(SMALLEST_FREE_DISK_BYTES)}; free some, or choose another run.root"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run alone. The kernel drops the lock with the process, so a killed run leaves none behind."""
        file = self.path / ".lock"
        with open(file, "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not file.exists() or not os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                    raise BlockingIOError  # deleted and made anew in between: what is locked is no longer the run's
            except BlockingIOError as error:
                raise ConfigError(
                    f"run.name: another process works in {self.path}; wait for it, or choose another run.name"
                ) from error
            self._end_swaps()
            yield

    def _end_swaps(self) -> None:
        """Ends what a killed `_swap` left: the earlier product goes back to its place, or away where the new one stands there."""
        for old in self.path.glob(".*.old"):
            final = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
            if final.exists():
                shutil.rmtree(old)
            else:
                os.replace(old, final)
                log("run", f"{final} is the earlier one again: putting the new one in its place was interrupted")

    def is_done(self, stage: str) -> bool:
        """Whether a stage has finished and was not asked for again."""
        return self.manifest(stage) is not None and stage not in self.again

    @contextmanager
    def measured(self, stage: str) -> Iterator[dict[str, Any]]:
        """Takes time and memory of a stage that lives in memory; what is put into the dict becomes its manifest."""
        facts: dict[str, Any] = {}
        started = time.monotonic()
        with PeakMemory(self.path / "memory.jsonl", stage=stage) as peak:
            yield facts
        (self.path / stage).mkdir(exist_ok=True)
        write_json(
            self.path / stage / "manifest.json", {"stage": stage, "product": to_jsonable(facts), **_cost(started, peak)}
        )

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage wrote about itself, or None where it has not finished."""
        file = self.path / stage / "manifest.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def once(self, verb: Callable[..., Product], config: Any, **inputs: Any) -> Product:
        """Runs ``verb(config, folder=..., **inputs)`` unless its product is there already.

        The stage is named after the verb's room. The product is a frozen dataclass whose ``folder`` is the stage's
        folder; its other fields go into ``manifest.json``, written last and atomically.

        Args:
            verb: A room's verb, annotated with the product that it returns.
            config: The room's config; with the products among ``inputs``, it decides whether old work still holds.
            inputs: Whatever else the verb needs.

        Returns:
            The product, fresh or read back from the manifest.

        Raises:
            ConfigError: The stage was done with other settings or inputs.
        """
        stage = verb.__module__.split(".")[1]
        product_type = product_of(verb)
        key = fingerprint(config, inputs)
        done = self.manifest(stage)
        if done is not None and stage not in self.again:
            if done["key"] != key:
                raise ConfigError(_changed(self.path / stage, stage, done, config))
            log(stage, f"done before: {self.path / stage} is used as it is")
            return product_type(folder=self.path / stage, **done["product"])  # type: ignore[call-arg]
        return self._run(verb, stage=stage, key=key, config=config, inputs=inputs, redo=done is not None)

    def product(self, verb: Callable[..., Product]) -> Product:
        """What a finished stage left, read back without asking how it was made; the stage must be done."""
        stage = verb.__module__.split(".")[1]
        done = json.loads((self.path / stage / "manifest.json").read_text())
        return product_of(verb)(folder=self.path / stage, **done["product"])  # type: ignore[call-arg]

    def _run(
        self, verb: Callable[..., Product], *, stage: str, key: str, config: Any, inputs: dict[str, Any], redo: bool
    ) -> Product:
        final = self.path / stage
        work = self.path / f".{stage}.new" if redo else final
        if redo and work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with PeakMemory(self.path / "memory.jsonl", stage=stage) as peak:
            product = verb(config, folder=work, **inputs)
        fields = {f.name: getattr(product, f.name) for f in dataclasses.fields(product) if f.name != "folder"}  # type: ignore[arg-type]
        manifest = {
            "stage": stage,
            "key": key,
            "config": to_jsonable(config),
            "product": to_jsonable(fields),
            **_cost(started, peak),
        }
        write_json(work / "manifest.json", manifest)
        if redo:
            _swap(work, final)
        return dataclasses.replace(product, folder=final)  # type: ignore[type-var]


def product_of(verb: Callable[..., Product]) -> type[Product]:
    """The class that a verb's annotation promises. Only that one is looked up: the others may not be importable here."""
    promised = verb.__annotations__["return"]
    return verb.__globals__[promised] if isinstance(promised, str) else promised


def fingerprint(config: Any, inputs: dict[str, Any]) -> str:
    """Names a stage's work: its config and the products that it starts from; live objects are left out."""
    kinds = (str, int, float, dict)
    products = {
        name: to_jsonable(value)
        for name, value in sorted(inputs.items())
        if dataclasses.is_dataclass(value) or isinstance(value, kinds)
    }
    for product in products.values():
        if isinstance(product, dict):
            product.pop("folder", None)  # a run folder may be moved
    content = json.dumps([to_jsonable(config), products], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def to_jsonable(value: Any) -> Any:
    """A dataclass, path or tuple as what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(file: Path, content: Any) -> None:
    """Writes beside the file, then renames: a reader sees the old content or the new, never half of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _cost(started: float, peak: PeakMemory) -> dict[str, Any]:
    return {
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak.rss_bytes,
        "peak_device_bytes": peak.device_bytes,
    }


def _swap(work: Path, final: Path) -> None:
    """Puts a stage done again in the place of the earlier one; `RunFolder.lock` mends what a kill in between leaves."""
    old = final.with_name(f".{final.name}.old")
    os.replace(final, old)
    os.replace(work, final)
    shutil.rmtree(old)


def _changed(path: Path, stage: str, done: dict[str, Any], config: Any) -> str:
    before, now = done["config"], to_jsonable(config)
    differences = [
        f"{stage}.{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    what = "; ".join(differences) or "the products that it starts from differ"
    return f"{path} was made with other settings ({what}); choose another run.name, or run.if_exists=overwrite to start again"
