"""Writes a folder of safetensors as one GGUF, a tensor at a time, its rows in pieces."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFWriter

from finetune.console import human_bytes
from finetune.errors import ExportError
from finetune.export.gguf import vocabulary
from finetune.export.gguf.architecture import Layout
from finetune.export.gguf.library import quantize
from finetune.export.gguf.quant_types import MIXTURES, Kind, kind_of, row_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.inference.chat import Chat

PIECE = 1 << 22
"""Numbers of a tensor that are float32 at once, for each thread: 16 MiB."""

QUANTIZATION_VERSION = 2
"""Of ggml's blocks, since 2023."""

FROM_DISK = 1.02
"""Room asked for beside the tensors, for vocabulary and padding."""

LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class Planned:
    """A tensor as it will be written.

    Attributes:
        name: In the GGUF.
        source: In the safetensors; None for Llama 3's rotary frequencies.
        shape: Rows and columns, or one length.
        kind: Its numbers.
        forced: Whether its shape forced another type than the format's.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: Kind
    forced: bool

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape[:-1])) * row_bytes(self.kind, self.shape[-1])


def write_model(folder: Path, target: Path, *, chat: Chat, numbers: str, name: str, threads: int) -> list[str]:
    """Writes the whole model with its tokenizer and template.

    Args:
        folder: config.json and safetensors.
        target: The file.
        chat: Tokenizer and end tokens.
        numbers: A format of `numbers.MIXTURES`.
        name: Of the model, as others will see it.
        threads: That quantize.

    Returns:
        What is not as the format's or the model's name promises, in sentences.

    Raises:
        ExportError: llama.cpp has no place for it, its disk is too small, or a weight is beyond float16.
    """
    layout, tensors = Layout(folder), Tensors(folder)
    plans = list(_plan(layout, tensors, numbers=numbers))
    check_space(target, sum(plan.bytes for plan in plans))
    writer = GGUFWriter(target, MODEL_ARCH_NAMES[layout.architecture.kind])
    writer.add_name(name)
    writer.add_file_type(MIXTURES[numbers].file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    layout.describe(writer)
    rows = next(plan.shape[0] for plan in plans if plan.name == "token_embd.weight")
    notes = [*layout.notes(), *_forced(plans, numbers), *vocabulary.describe(writer, chat, rows=rows)]

    def read(plan: Planned) -> Tensor:
        import torch

        if plan.source is None:
            return torch.tensor(layout.frequencies())
        return layout.arrange(plan.source, tensors.read(plan.source))

    write_tensors(writer, plans, read, threads=threads)
    return notes


def write_tensors(writer: GGUFWriter, plans: list[Planned], read: Any, *, threads: int) -> None:
    """Writes the fields that the writer holds, then each tensor that ``read(plan)`` gives; closes the file."""
    for plan in plans:
        writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), plan.bytes, raw_dtype=plan.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    with ThreadPoolExecutor(threads) as pool:
        for plan in plans:
            for piece in pool.map(_convert, *zip(*_pieces(plan, read(plan)), strict=True)):
                file.write(piece.data)
            writer.write_padding(file, plan.bytes)
    writer.close()


def _pieces(plan: Planned, tensor: Tensor) -> Iterator[tuple[Planned, Tensor]]:
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(PIECE // rows.shape[1], 1)
    for first in range(0, len(rows), step):
        yield plan, rows[first : first + step]


def _convert(plan: Planned, rows: Tensor) -> np.ndarray:
    import torch

    numbers = rows.to(torch.float32).numpy()
    if plan.kind == Kind.F16 and np.abs(numbers).max() > LARGEST_F16:
        raise ExportError(
            f"{plan.source} holds numbers beyond float16, up to {np.abs(numbers).max():.4g}: export bf16 or q8_0 instead"
        )
    if plan.kind == Kind.F32:
        return np.ascontiguousarray(numbers)
    return quantize(numbers, plan.kind, row_bytes=row_bytes(plan.kind, numbers.shape[1]))


def check_space(target: Path, size: int) -> None:
    """Refuses what the disk cannot hold."""
    needed, free = int(size * FROM_DISK), shutil.disk_usage(target.parent).free
    if needed > free:
        raise ExportError(
            f"{target.parent} has {human_bytes(free)} left and {target.name} needs {human_bytes(needed)}: make room, or put the run "
            "elsewhere with run.root"
        )


def _plan(layout: Layout, tensors: Tensors, *, numbers: str) -> Iterator[Planned]:
    mixture = MIXTURES[numbers]
    tied = layout.tied or "lm_head.weight" not in tensors.files
    for source in tensors.files:
        name, shape = layout.rename(source), tensors.shape(source)
        if name is not None:
            kind, forced = kind_of(
                name, shape, mixture=mixture, layers=layout.layers, tied=tied, grouped=layout.key_heads < layout.heads
            )  # fmt: skip
            yield Planned(name, source, shape, kind, forced)
    frequencies = layout.frequencies()
    if frequencies:
        yield Planned("rope_freqs.weight", None, (len(frequencies),), Kind.F32, False)


def _forced(plans: list[Planned], numbers: str) -> list[str]:
    """Which tensors are not in the numbers that the format's name says."""
    forced = [plan for plan in plans if plan.forced]
    if not forced:
        return []
    kinds = ", ".join(
        f"{count} as {kind.name}" for kind, count in sorted(Counter(plan.kind for plan in forced).items())
    )
    columns = " and ".join(str(width) for width in sorted({plan.shape[-1] for plan in forced}))
    matrices = sum(plan.kind != Kind.F32 for plan in plans)
    return [
        f"{len(forced)} of {matrices} matrices have rows of {columns} numbers, which the blocks of 256 of {numbers.upper()} do not divide; "
        f"they are wider, as llama.cpp writes them: {kinds}"
    ]


class Tensors:
    """The tensors of a folder of safetensors, by name, in the order in which they are stored.

    Attributes:
        files: The file of each tensor.
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
                for key in file.keys():  # noqa: SIM118, it is no dict
                    self.files[key], self._shapes[key] = folder / name, tuple(file.get_slice(key).get_shape())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """One tensor. Its file is opened anew each time: a mapped file that stays open counts as memory, page after page."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
