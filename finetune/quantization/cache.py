"""Caches the quantized base: the next start reads a quarter of the bytes and quantizes nothing.

A digest over all tensors of a model read from the cache must equal that of the model that was written.
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
from finetune.quantization.backends import all_tensors, restore, save
from finetune.quantization.config import QuantizationConfig, spec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from finetune.hardware import Placement

RECORD = "record.json"
CONFIGS = ("config.json", "generation_config.json")
PACKAGES = ("transformers", "torch")
UNUSED_DAYS = 30
"""Entries that no run has read for so long are removed when the next one is written; that costs one slow start."""

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, AttributeError)
"""What libraries raise when they read damaged files."""

SHARD = "2GB"
"""Bounds the host memory for saving a model that is on a GPU."""


@dataclass(frozen=True, kw_only=True)
class QuantizedCache:
    """The cache entry of one quantized base, whether it exists yet or not.

    Attributes:
        folder: Holds config.json, safetensors and record.json, which is written last. Its name is the method and a hash
            over everything that decides the quantized weights.
        base: Folder of the dense base.
        quantization: The quantization group.
        dtype: Of the computation.
        threads: Threads that compute the digest.
    """

    folder: Path
    base: Path
    quantization: QuantizationConfig
    dtype: str
    threads: int

    @property
    def is_complete(self) -> bool:
        """Whether the entry was written."""
        return (self.folder / RECORD).is_file()

    def read(self, load: Callable[[Path], PreTrainedModel]) -> PreTrainedModel | None:
        """Returns the cached model; None where there is none, or a damaged one, which is removed.

        Args:
            load: Loads a folder with transformers, as it was saved.
        """
        if not self.is_complete:
            return None
        from safetensors import SafetensorError

        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            model = restore(self.base, self.quantization, self.folder, dtype=self.dtype, load=load)
            same = digest(model, threads=self.threads) == record["digest"]
            damage = "" if same else "its tensors differ from those that were written"
        except (*LOAD_ERRORS, SafetensorError) as error:
            damage = str(error).strip().partition("\n")[0] or type(error).__name__
        if damage:
            log("model", f"the quantized base {self.folder} is damaged ({damage}); removed, and quantized again")
            self._remove()
            return None
        with contextlib.suppress(OSError):
            os.utime(self.folder / RECORD)
        log("model", f"quantized base of {record['made']} read from {self.folder} ({human_bytes(record['bytes'])})")
        return model

    def write(self, model: PreTrainedModel) -> None:
        """Writes the model under a temporary name and renames it. If that fails, logs why; the run continues.

        Of several processes that start at once, only one writes.
        """
        from safetensors import SafetensorError

        root = self.folder.parent
        partial = root / f".{self.folder.name}.{os.getpid()}"
        try:
            with _exclusive(root) as is_only_writer:
                if not is_only_writer or self.folder.is_dir():
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
                f"the quantized base is not cached ({error}), so the next start quantizes again; "
                "set FINETUNE_CACHE to another folder",
            )
        else:
            log("model", f"the quantized base ({human_bytes(size)}) is cached in {self.folder}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _record(self, model: PreTrainedModel, size: int) -> dict[str, Any]:
        made = time.strftime("%Y-%m-%d %H:%M")
        return {"digest": digest(model, threads=self.threads), "bytes": size, "made": made}

    def _remove(self) -> None:
        # Renamed first: a reader finds a complete entry or none.
        aside = self.folder.with_name(f".{self.folder.name}.damaged.{os.getpid()}")
        with contextlib.suppress(OSError):
            os.replace(self.folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def quantized_cache(
    base: Path, *, weights: str, quantization: QuantizationConfig, placement: Placement
) -> QuantizedCache | None:
    """Returns the cache entry of a quantized base; logs why and returns None where the cache cannot be used.

    Args:
        base: Folder of the dense base.
        weights: Hash of its weight files.
        quantization: The quantization group.
        placement: Its dtype and device are part of the key: each device quantizes with its own kernels.
    """
    try:
        root = cache_folder("quantized")
    except OSError as error:
        log("model", f"the cache of quantized bases cannot be used ({error}); set FINETUNE_CACHE to another folder")
        return None
    configs = {name: (base / name).read_text(encoding="utf-8") for name in CONFIGS if (base / name).is_file()}
    versions = [version(package) for package in dict.fromkeys([BACKENDS[quantization.method].library, *PACKAGES])]
    content = [weights, configs, spec(quantization), placement.dtype, placement.device, versions, _code_sha256()]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder = root / f"{quantization.method}-{key[:24]}"
    return QuantizedCache(
        folder=folder, base=base, quantization=quantization, dtype=placement.dtype, threads=placement.threads
    )


def digest(model: nn.Module, *, threads: int) -> str:
    """Returns the SHA-256 over names, dtypes, shapes and bytes of all parameters, buffers and quantization constants.

    Tied weights come once, so that weights that are no longer tied change the digest.
    """
    tensors = list(all_tensors(model))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        hashes = pool.map(_tensor_sha256, [tensor for _, tensor in tensors])
        lines = [
            f"{name} {tensor.dtype} {tuple(tensor.shape)} {sha256}"
            for (name, tensor), sha256 in zip(tensors, hashes, strict=True)
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensor_sha256(tensor: Tensor) -> str:
    import torch

    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data).hexdigest()


def _code_sha256() -> str:
    hasher = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[bool]:
    """Yields whether this is the only process that writes at the moment."""
    with open(root / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _check_space(root: Path, model: nn.Module) -> None:
    """Requires twice the size: the run is about to write checkpoints, often to the same disk."""
    need_bytes = 2 * sum(tensor.nbytes for _, tensor in all_tensors(model))
    require_disk(root, need_bytes, "twice the quantized base", remedy="free some space", error=OSError)


def _flush(folder: Path) -> None:
    """Flushes the files to disk before the rename, so that a crash leaves no entry full of zeros."""
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _prune(root: Path, *, keep: Path) -> None:
    """Removes entries unused for long, and partial ones that killed processes left a day ago or earlier."""
    now = time.time()
    for path in root.iterdir():
        if path == keep or not path.is_dir():
            continue
        used = (path / RECORD).stat().st_mtime if (path / RECORD).is_file() else path.stat().st_mtime
        if now - used > (1 if path.name.startswith(".") else UNUSED_DAYS) * 86400:
            shutil.rmtree(path, ignore_errors=True)
