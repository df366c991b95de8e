"""Reads and writes safetensors in pieces, so that a whole shard is never in memory and no page stays mapped.

Source: the file format in https://github.com/huggingface/safetensors (8 bytes of header length, JSON, then raw data).
"""

import json
import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from finetune.errors import MergeError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES = 4 * 1024**2
"""Bytes per read. Measured on 1.6 GB: 1 MiB 8.6 s, 4 MiB 8.0 s, 32 MiB 15.2 s (each larger buffer is mapped anew)."""

MAX_WAITING_PIECES = 4

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk.

    Attributes:
        file: The safetensors file.
        dtype: Of its elements.
        shape: Empty for a scalar.
        start: Offset of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, rows) in order, each of about 4 MiB; a scalar is one piece."""
        rows = self.shape[0] if self.shape else 1
        row_bytes = max(self.row_bytes, 1)
        step = max(1, PIECE_BYTES // row_bytes)
        with open(self.file, "rb") as handle:
            handle.seek(self.start)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                buffer = np.fromfile(handle, dtype=np.uint8, count=count * row_bytes)
                shape = (count, *self.shape[1:]) if self.shape else ()
                yield first, torch.from_numpy(buffer).view(self.dtype).reshape(shape)


def read_checkpoint(folder: Path) -> dict[str, list[tuple[str, StoredTensor]]]:
    """Finds the tensors of a model folder, by file and in the order of their data.

    Returns:
        ``{file name: [(tensor name, its place on disk)]}``.

    Raises:
        MergeError: There is no safetensors file, a shard is missing, or a dtype is one that a merge cannot add to.
    """
    files: dict[str, list[tuple[str, StoredTensor]]] = {}
    for name in _weight_files(folder):
        if not (folder / name).is_file():
            raise MergeError(f"{folder} is incomplete: its index names {name}, which is missing; fetch the base again")
        files[name] = read_header(folder / name)
    return files


def read_header(file: Path) -> list[tuple[str, StoredTensor]]:
    """Reads the place of each tensor in one file.

    Raises:
        MergeError: The file is cut off, or holds a dtype that a merge cannot add to.
    """
    with open(file, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    size, begin = file.stat().st_size, 8 + length
    tensors = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = (begin + offset for offset in entry["data_offsets"])
        if end > size:
            raise MergeError(f"{file} is cut off: it has {size} bytes and {name} ends at {end}; fetch the base again")
        code, shape = entry["dtype"], tuple(entry["shape"])
        if code not in DTYPES:
            raise MergeError(
                f"{file}: {name} is stored as {code}; a merge needs one of {', '.join(DTYPES)}: use the unquantized "
                "base"
            )
        tensors.append((name, StoredTensor(file=file, dtype=DTYPES[code], shape=shape, start=start)))
    return tensors


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(names) == 1:
        return names
    raise MergeError(
        f"{folder} holds {len(names)} safetensors files and no {INDEX}, so it is unclear which belong together; "
        "save the model again"
    )


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file to write; all headers are known before the first byte is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class ShardWriter:
    """Writes one safetensors file: the tensors in the order of ``headers``, each in any number of pieces.

    A thread writes, so that the next piece is computed meanwhile; at most `MAX_WAITING_PIECES` wait.
    """

    def __init__(self, file: Path, headers: list[TensorHeader]) -> None:
        self.file = file
        self.expected = sum(tensor.size for tensor in headers)
        self.written = 0
        self._handle: BinaryIO = open(file, "wb")  # noqa: SIM115  # closed by __exit__
        self._handle.write(_header(headers))
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[int]] = deque()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for done in self._waiting:
                done.result()
            self._handle.flush()
            os.fsync(self._handle.fileno())
        self._handle.close()
        if kind is None and self.written != self.expected:
            raise MergeError(f"{self.file}: {self.written} bytes were written and {self.expected} were expected")

    def write(self, piece: Tensor) -> None:
        """Appends rows of the current tensor; waits where too many pieces are unwritten."""
        data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
        if len(self._waiting) == MAX_WAITING_PIECES:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._handle.write, data.data))
        self.written += data.nbytes


def _header(tensors: list[TensorHeader]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_index(folder: Path, files: dict[str, list[TensorHeader]]) -> None:
    """Writes the index that transformers needs where there is more than one file."""
    if list(files) == [SINGLE]:
        return
    weights = {tensor.name: name for name, headers in files.items() for tensor in headers}
    total = sum(tensor.size for headers in files.values() for tensor in headers)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
