"""The quantized base kept in the cache: the next start reads a quarter of the bytes and quantizes nothing.

Every model read from a copy is proven: a digest over all its tensors must be that of the model that was quantized.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cache import cache_folder
from finetune.console import human_bytes, log
from finetune.files import require_disk
from finetune.hardware.backends import BACKENDS
from finetune.quantization.backends import holdings, restore, save
from finetune.quantization.config import QuantizationConfig, spec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from finetune.hardware import Placement

RECORD = "copy.json"
CONFIGS = ("config.json", "generation_config.json")
PACKAGES = ("transformers", "torch")
UNUSED_DAYS = 30
"""A copy that no run has read for so long goes when the next one is made; quantizing again costs one slow start."""

SHARD = "2GB"
"""Bounds the host memory that saving takes where the model lies on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Where the quantized form of one base is kept, whether it is there yet or not.

    Attributes:
        folder: Holds config.json, safetensors and copy.json, which is written last. Its name is the method and a hash
            over everything that decides the quantized numbers.
        base: Folder of the dense base.
        quantization: The quantization group.
        dtype: The computation's numbers.
        threads: Threads that compute the digest.
    """

    folder: Path
    base: Path
    quantization: QuantizationConfig
    dtype: str
    threads: int

    def read(self, load: Callable[[Path], PreTrainedModel]) -> PreTrainedModel | None:
        """The model, the very tensors that were kept; None where there is no copy, or a damaged one, which is removed.

        Args:
            load: Opens a folder with transformers, as it was saved.
        """
        if not (self.folder / RECORD).is_file():
            return None
        from safetensors import SafetensorError

        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            model = restore(self.base, self.quantization, self.folder, dtype=self.dtype, load=load)
            wrong = (
                ""
                if digest(model, threads=self.threads) == record["digest"]
                else "its tensors are not those that were kept"
            )
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            AssertionError,
            AttributeError,
            SafetensorError,
        ) as error:
            wrong = str(error).strip().partition("\n")[0] or type(error).__name__
        if wrong:
            log(
                "model",
                f"the quantized copy {self.folder} is damaged ({wrong}); it is removed, and made again from the base",
            )
            self._remove()
            return None
        with contextlib.suppress(OSError):
            os.utime(self.folder / RECORD)
        log(
            "model",
            f"the quantized copy {self.folder} ({human_bytes(record['bytes'])}) is read and nothing is quantized, "
            f"because base and quantization are those of {record['made']}",
        )
        return model

    def keep(self, model: PreTrainedModel) -> None:
        """Writes the copy beside its place and renames it; says so where that cannot be, and the run goes on.

        Of processes that start at once, one writes.
        """
        from safetensors import SafetensorError

        root = self.folder.parent
        partial = root / f".{self.folder.name}.{os.getpid()}"
        try:
            with _alone(root) as alone:
                if not alone or self.folder.is_dir():
                    return
                _check_space(root, model)
                save(model, self.quantization, partial, shard=SHARD)
                size = sum(file.stat().st_size for file in partial.iterdir())
                (partial / RECORD).write_text(json.dumps(self._record(model, size), indent=2) + "\n", encoding="utf-8")
                _flush(partial)
                os.replace(partial, self.folder)
                _prune(root, keep=self.folder)
        except (OSError, SafetensorError) as error:
            log(
                "model",
                f"no quantized copy is kept ({error}), so the next start quantizes again; FINETUNE_CACHE names another place",
            )
        else:
            log("model", f"a quantized copy ({human_bytes(size)}) is kept for later starts: {self.folder}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _record(self, model: PreTrainedModel, size: int) -> dict[str, Any]:
        made = time.strftime("%Y-%m-%d %H:%M")
        return {"digest": digest(model, threads=self.threads), "bytes": size, "made": made}

    def _remove(self) -> None:
        # Renamed first: a reader finds the copy whole or not at all.
        aside = self.folder.with_name(f".{self.folder.name}.damaged.{os.getpid()}")
        with contextlib.suppress(OSError):
            os.replace(self.folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def quantized_cache(base: Path, *, weights: str, quantization: QuantizationConfig, placement: Placement) -> Copy | None:
    """The place of a base's quantized copy, or None where the cache cannot be used, which is said.

    Args:
        base: Folder of the dense base.
        weights: Hash of its weight files.
        quantization: The quantization group.
        placement: Its numbers, and its device, since each quantizes with kernels of its own, name the copy.
    """
    try:
        root = cache_folder("quantized")
    except OSError as error:
        log("model", f"no quantized copy can be kept or read ({error}); FINETUNE_CACHE names another place")
        return None
    configs = {name: (base / name).read_text(encoding="utf-8") for name in CONFIGS if (base / name).is_file()}
    versions = [version(package) for package in dict.fromkeys([BACKENDS[quantization.method].library, *PACKAGES])]
    content = [weights, configs, spec(quantization), placement.dtype, placement.device, versions, _code()]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder = root / f"{quantization.method}-{key[:24]}"
    return Copy(folder=folder, base=base, quantization=quantization, dtype=placement.dtype, threads=placement.threads)


def digest(model: nn.Module, *, threads: int) -> str:
    """SHA-256 over names, kinds, shapes and bytes of all parameters, buffers and quantization constants.

    Tied weights come once, so that a tie that was lost gives another list.
    """
    parts = list(holdings(model))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        hashes = pool.map(_tensor_sha256, [tensor for _, tensor in parts])
        lines = [
            f"{name} {tensor.dtype} {tuple(tensor.shape)} {one}"
            for (name, tensor), one in zip(parts, hashes, strict=True)
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensor_sha256(tensor: Tensor) -> str:
    import torch

    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data).hexdigest()


def _code() -> str:
    hasher = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[bool]:
    """Whether no other process writes a copy at this moment."""
    with open(root / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _check_space(root: Path, model: nn.Module) -> None:
    """Leaves as much again as the copy takes: the run itself is about to write checkpoints, often to the same disk."""
    need_bytes = 2 * sum(tensor.nbytes for _, tensor in holdings(model))
    require_disk(root, need_bytes, "twice the quantized copy", remedy="free some space", error=OSError)


def _flush(folder: Path) -> None:
    """On disk before the rename, so that a machine that stops leaves no copy of zeros behind."""
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _prune(root: Path, *, keep: Path) -> None:
    """Removes copies unused for long, and what killed processes left half written a day ago."""
    now = time.time()
    for path in root.iterdir():
        if path == keep or not path.is_dir():
            continue
        used = (path / RECORD).stat().st_mtime if (path / RECORD).is_file() else path.stat().st_mtime
        if now - used > (1 if path.name.startswith(".") else UNUSED_DAYS) * 86400:
            shutil.rmtree(path, ignore_errors=True)
