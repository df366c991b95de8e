"""Writes a folder of safetensors as one GGUF file: one tensor at a time, its rows in pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFWriter

from finetune.errors import ExportError
from finetune.export.gguf.architecture import Layout
from finetune.export.gguf.fields import write_fields
from finetune.export.gguf.library import quantize
from finetune.export.gguf.quant_types import QUANT_MIXES, QuantType, row_bytes, tensor_type
from finetune.export.gguf.tensors import Checkpoint, Part, left_out, parts
from finetune.export.gguf.vocabulary import write_vocabulary
from finetune.files import require_disk
from finetune.model.text_only import decoder_name

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
        part: Its name, shape and rows.
        type: Of its elements.
        forced: Whether its shape forced another type than the format's.
    """

    part: Part
    type: QuantType
    forced: bool

    @property
    def bytes(self) -> int:
        return int(np.prod(self.part.shape[:-1])) * row_bytes(self.type, self.part.shape[-1])


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
    tied = layout.tied or not any(decoder_name(name) == "lm_head.weight" for name in checkpoint.files)
    tensors = [_typed(part, layout, dtype=dtype, tied=tied) for part in parts(layout, checkpoint)]
    require_disk(target.parent, required_bytes(tensors), target.name, error=ExportError)
    writer = GGUFWriter(target, MODEL_ARCH_NAMES[layout.architecture.arch])
    writer.add_name(name)
    writer.add_file_type(QUANT_MIXES[dtype].file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    write_fields(writer, layout)
    rows = next(tensor.part.shape[0] for tensor in tensors if tensor.part.name == "token_embd.weight")
    notes = [*layout.notes(), *left_out(layout, checkpoint), *_forced_notes(tensors, dtype)]
    notes += write_vocabulary(writer, chat, rows=rows)
    write_tensors(writer, tensors, threads=threads)
    return notes


def required_bytes(tensors: list[GGUFTensor]) -> float:
    """Returns the disk space of a file with these tensors."""
    return DISK_FACTOR * sum(tensor.bytes for tensor in tensors)


def write_tensors(writer: GGUFWriter, tensors: list[GGUFTensor], *, threads: int) -> None:
    """Writes the writer's fields, then each tensor, and closes the file."""
    for tensor in tensors:
        part = tensor.part
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    with ThreadPoolExecutor(threads) as pool:
        for tensor in tensors:
            for values in tensor.part.read():
                for converted in pool.map(partial(_convert, tensor), _pieces(values)):
                    file.write(converted.data)
            writer.write_padding(file, tensor.bytes)
    writer.close()


def _pieces(values: Tensor) -> Iterator[Tensor]:
    rows = values.reshape(-1, values.shape[-1])
    yield from rows.split(max(PIECE_ELEMENTS // rows.shape[1], 1))


def _convert(tensor: GGUFTensor, rows: Tensor) -> np.ndarray:
    import torch

    values = rows.to(torch.float32).numpy()
    if tensor.type == QuantType.F16 and (largest := np.abs(values).max()) > LARGEST_F16:
        raise ExportError(
            f"{tensor.part.source} has weights that overflow float16, up to {largest:.4g}: export bf16 or q8_0 instead"
        )
    if tensor.type == QuantType.F32:
        return np.ascontiguousarray(values)
    return quantize(values, tensor.type, row_bytes=row_bytes(tensor.type, values.shape[1]))


def _typed(part: Part, layout: Layout, *, dtype: str, tied: bool) -> GGUFTensor:
    chosen, forced = tensor_type(
        part.name,
        part.shape,
        mix=QUANT_MIXES[dtype],
        layers=layout.layers,
        tied=tied,
        grouped=layout.kv_heads < layout.heads,
        experts=layout.experts,
    )
    return GGUFTensor(part, chosen, forced)


def _forced_notes(tensors: list[GGUFTensor], dtype: str) -> list[str]:
    """Counts the tensors that do not have the format's type."""
    forced = [tensor for tensor in tensors if tensor.forced]
    if not forced:
        return []
    counts = sorted(Counter(tensor.type for tensor in forced).items())
    columns = " and ".join(str(width) for width in sorted({tensor.part.shape[-1] for tensor in forced}))
    matrices = sum(tensor.type != QuantType.F32 for tensor in tensors)
    return [
        f"{len(forced)} of {matrices} matrices have rows of {columns} weights, which the blocks of 256 of "
        f"{dtype.upper()} do not divide; they have more bits, as llama.cpp writes them: "
        + ", ".join(f"{count} as {quant_type.name}" for quant_type, count in counts)
    ]
