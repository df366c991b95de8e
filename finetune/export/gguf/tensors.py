"""Says which tensors of a checkpoint make each tensor of a GGUF, and reads them a part at a time."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finetune.model.text_only import decoder_name
from finetune.quantization.expert_tensors import expert_form, expert_tensor
from finetune.quantization.experts import DOWN, FUSED, GATE, UP, halves

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.export.gguf.architecture import Layout

EXPERT_NAMES = {GATE: "ffn_gate_exps", UP: "ffn_up_exps", DOWN: "ffn_down_exps"}


class Part(NamedTuple):
    """A tensor of a GGUF before its type is chosen.

    Attributes:
        name: In the GGUF.
        source: In the checkpoint, for messages.
        shape: Rows and columns, experts first, or one length.
        read: Yields the tensor's rows in order, in several tensors.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Tensor]]


def parts(layout: Layout, checkpoint: Checkpoint) -> Iterator[Part]:
    """Yields the tensors of a model's GGUF.

    Raises:
        ExportError: llama.cpp has no place for one.
    """
    stacks: dict[str, dict[int, str]] = {}
    for source in checkpoint.files:
        if layout.is_left_out(source):
            continue
        place = expert_tensor(source.removesuffix("_bias"))
        if place and place.number is not None:
            stacks.setdefault(f"blk.{place.block}.{EXPERT_NAMES[place.layer]}.weight", {})[place.number] = source
        elif place:
            yield from _fused_experts(layout, checkpoint, source, block=place.block, layer=place.layer)
        elif source.endswith("shared_mlp.input_linear.weight"):
            yield from _gate_and_up(checkpoint, source)
        elif (name := layout.gguf_name(source)) is not None:
            read = partial(_one, layout, checkpoint, source)
            yield Part(name, source, _squeezed(source, checkpoint.shape(source)), read)
    for name, sources in stacks.items():
        first = sources[0]
        yield Part(name, first, (len(sources), *checkpoint.shape(first)), partial(_stack, checkpoint, sources))
    if factors := layout.rope_factors():
        yield Part("rope_freqs.weight", "rope_parameters", (len(factors),), partial(_values, factors))


def left_out(layout: Layout, checkpoint: Checkpoint) -> list[str]:
    """Returns one sentence that counts the tensors that are not written; none if all are."""
    names = [decoder_name(name) for name in checkpoint.files if layout.is_left_out(name)]
    if not names:
        return []
    owners = Counter(re.sub(r"^model\.(?!layers)", "", name).split(".")[0] for name in names)
    owners["layers that predict further tokens"] = owners.pop("model", 0)
    what = ", ".join(f"{count} of {owner}" for owner, count in sorted(owners.items()) if count)
    return [f"text only: {len(names)} tensors of the checkpoint are left out ({what})"]


def _squeezed(source: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2]) if source.endswith(("conv.conv.weight", "linear_attn.conv1d.weight")) else shape


def _one(layout: Layout, checkpoint: Checkpoint, source: str) -> Iterator[Tensor]:
    yield layout.converted(source, checkpoint.read(source))


def _stack(checkpoint: Checkpoint, sources: dict[int, str]) -> Iterator[Tensor]:
    for number in range(len(sources)):
        yield checkpoint.read(sources[number])


def _values(values: list[float]) -> Iterator[Tensor]:
    import torch

    yield torch.tensor(values)


def _gate_and_up(checkpoint: Checkpoint, source: str) -> Iterator[Part]:
    """Yields the halves of Granite's fused matrix, which llama.cpp keeps apart."""
    block = source.split("layers.")[1].split(".")[0]
    rows, columns = checkpoint.shape(source)
    for half, name in enumerate(("ffn_gate", "ffn_up")):

        def read(half: int = half) -> Iterator[Tensor]:
            yield checkpoint.read(source).chunk(2)[half]

        yield Part(f"blk.{block}.{name}.weight", source, (rows // 2, columns), read)


def _fused_experts(layout: Layout, checkpoint: Checkpoint, source: str, *, block: int, layer: str) -> Iterator[Part]:
    """Yields the layers of experts that the checkpoint holds in one 3-D parameter, or their biases in one of 2-D."""
    form, (count, *one) = expert_form(layout.folder), checkpoint.shape(source)
    ending = "bias" if source.endswith("_bias") else "weight"
    if form.transposed and ending == "weight":
        one.reverse()
    for index, name in enumerate((DOWN,) if layer == FUSED[1] else (GATE, UP)):
        shape = (count, *one) if name == DOWN else (count, one[0] // 2, *one[1:])

        def read(index: int = index, name: str = name) -> Iterator[Tensor]:
            for number in range(count):
                expert = checkpoint.read(source, number)
                if name == DOWN:
                    yield expert.t() if form.transposed and expert.dim() == 2 else expert
                else:
                    yield halves(expert, **form._asdict())[index]

        yield Part(f"blk.{block}.{EXPERT_NAMES[name]}.{ending}", source, shape, read)


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

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Reads one tensor, or one entry of its first dimension.

        Opens its file each time, since the pages of an open mapped file count as memory.
        """
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        return tensor
