"""Writes a folder of safetensors as one GGUF file: one tensor at a time, its rows in pieces."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFWriter

from finetune.errors import ExportError
from finetune.export.gguf.architecture import Layout
from finetune.export.gguf.library import quantize
from finetune.export.gguf.quant_types import QUANT_MIXES, QuantType, row_bytes, tensor_type
from finetune.export.gguf.vocabulary import write_vocabulary
from finetune.files import require_disk

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.inference.chat import Chat

PIECE_ELEMENTS = 1 << 22
"""Elements of a tensor that each thread holds in float32: 16 MiB."""

QUANTIZATION_VERSION = 2
"""Version of ggml's blocks, unchanged since 2023."""

DISK_FACTOR = 1.02
"""Disk required relative to the tensors, for vocabulary and padding."""

LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as it will be written.

    Attributes:
        name: In the GGUF.
        source: Name in the safetensors; None for Llama 3's rotary frequencies.
        shape: Rows and columns, or one length.
        type: Of its elements.
        forced: Whether its shape forced another type than the format's.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    type: QuantType
    forced: bool

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape[:-1])) * row_bytes(self.type, self.shape[-1])


def write_model(folder: Path, target: Path, *, chat: Chat, dtype: str, name: str, threads: int) -> list[str]:
    """Writes the whole model with its tokenizer and chat template.

    Args:
        folder: config.json and safetensors.
        target: The file.
        chat: Tokenizer and end tokens.
        dtype: A format of `quant_types.QUANT_MIXES`.
        name: The model's name, written into the file.
        threads: Number of threads that quantize.

    Returns:
        One sentence for each difference from the format or from the model.

    Raises:
        ExportError: llama.cpp does not support the model, the disk is too small, or a weight is too large for float16.
    """
    layout, checkpoint = Layout(folder), Checkpoint(folder)
    tensors = list(_plan(layout, checkpoint, dtype=dtype))
    require_disk(target.parent, required_bytes(tensors), target.name, error=ExportError)
    writer = GGUFWriter(target, MODEL_ARCH_NAMES[layout.architecture.arch])
    writer.add_name(name)
    writer.add_file_type(QUANT_MIXES[dtype].file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    layout.write_fields(writer)
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    notes = [*layout.notes(), *_forced_notes(tensors, dtype), *write_vocabulary(writer, chat, rows=rows)]

    def read(tensor: GGUFTensor) -> Tensor:
        import torch

        if tensor.source is None:
            return torch.tensor(layout.rope_factors())
        return layout.permute_rows(tensor.source, checkpoint.read(tensor.source))

    write_tensors(writer, tensors, read, threads=threads)
    return notes


def required_bytes(tensors: list[GGUFTensor]) -> float:
    """Returns the disk space of a file with these tensors."""
    return DISK_FACTOR * sum(tensor.bytes for tensor in tensors)


def write_tensors(
    writer: GGUFWriter, tensors: list[GGUFTensor], read: Callable[[GGUFTensor], Tensor], *, threads: int
) -> None:
    """Writes the writer's fields, then each tensor that ``read`` returns, and closes the file."""
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    with ThreadPoolExecutor(threads) as pool:
        for tensor in tensors:
            for piece in pool.map(_convert, *zip(*_pieces(tensor, read(tensor)), strict=True)):
                file.write(piece.data)
            writer.write_padding(file, tensor.bytes)
    writer.close()


def _pieces(tensor: GGUFTensor, values: Tensor) -> Iterator[tuple[GGUFTensor, Tensor]]:
    rows = values.reshape(-1, values.shape[-1])
    step = max(PIECE_ELEMENTS // rows.shape[1], 1)
    for first in range(0, len(rows), step):
        yield tensor, rows[first : first + step]


def _convert(tensor: GGUFTensor, rows: Tensor) -> np.ndarray:
    import torch

    values = rows.to(torch.float32).numpy()
    if tensor.type == QuantType.F16 and (largest := np.abs(values).max()) > LARGEST_F16:
        raise ExportError(
            f"{tensor.source} has weights that overflow float16, up to {largest:.4g}: export bf16 or q8_0 instead"
        )
    if tensor.type == QuantType.F32:
        return np.ascontiguousarray(values)
    return quantize(values, tensor.type, row_bytes=row_bytes(tensor.type, values.shape[1]))


def _plan(layout: Layout, checkpoint: Checkpoint, *, dtype: str) -> Iterator[GGUFTensor]:
    mix, grouped = QUANT_MIXES[dtype], layout.kv_heads < layout.heads
    tied = layout.tied or "lm_head.weight" not in checkpoint.files
    for source in checkpoint.files:
        name, shape = layout.gguf_name(source), checkpoint.shape(source)
        if name is not None:
            chosen, forced = tensor_type(name, shape, mix=mix, layers=layout.layers, tied=tied, grouped=grouped)
            yield GGUFTensor(name, source, shape, chosen, forced)
    factors = layout.rope_factors()
    if factors:
        yield GGUFTensor("rope_freqs.weight", None, (len(factors),), QuantType.F32, False)


def _forced_notes(tensors: list[GGUFTensor], dtype: str) -> list[str]:
    """Counts the tensors that do not have the format's type."""
    forced = [tensor for tensor in tensors if tensor.forced]
    if not forced:
        return []
    counts = sorted(Counter(tensor.type for tensor in forced).items())
    columns = " and ".join(str(width) for width in sorted({tensor.shape[-1] for tensor in forced}))
    matrices = sum(tensor.type != QuantType.F32 for tensor in tensors)
    return [
        f"{len(forced)} of {matrices} matrices have rows of {columns} weights, which the blocks of 256 of "
        f"{dtype.upper()} do not divide; they have more bits, as llama.cpp writes them: "
        + ", ".join(f"{count} as {quant_type.name}" for quant_type, count in counts)
    ]


class Checkpoint:
    """The tensors of a folder of safetensors, in the order in which they are stored.

    Attributes:
        files: The file of each tensor, by the tensor's name.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        names = (
            sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if index.is_file()
            else sorted(file.name for file in folder.glob("*.safetensors"))
        )
        self.files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, it is not a dict
                    self.files[key], self._shapes[key] = folder / name, tuple(file.get_slice(key).get_shape())

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """Reads one tensor. Opens its file each time, since the pages of an open mapped file count as memory."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
