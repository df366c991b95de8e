"""Finds the experts of a mixture in its checkpoint: one by one as on the hub, or in the 3-D parameters of transformers.

A quantized base and an adapter have them as the linear layers of `finetune.quantization.experts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.errors import MergeError
from finetune.merge.adapter_deltas import Change, LowRank
from finetune.quantization.expert_tensors import ExpertForm, ExpertTensor, expert_form, expert_tensor
from finetune.quantization.experts import DOWN, EXPERT_LAYERS, FUSED, GATE, UP, halves, joined

if TYPE_CHECKING:
    from finetune.quantization.stored import StoredLayers


ROUTER = re.compile(r"layers\.(\d+)\.(?:.*\.)?(gate|router)\.(weight|bias)$")
"""Names of routers in the classes of transformers 5.23: the number of the decoder layer, and the ending."""


def is_expert_change(name: str) -> bool:
    """Returns whether an adapter's change of that name is one of experts."""
    place = expert_tensor(name)
    return place is not None and place.layer in EXPERT_LAYERS


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """A 3-D parameter whose experts are read one at a time.

    Attributes:
        count: Number of experts.
        read: Returns the weight of one expert's layer, shape (outputs, inputs).
        layer: One of `FUSED`.
        form: How gate, up and down lie in it.
    """

    count: int
    read: Callable[[int, str], Tensor]
    layer: str
    form: ExpertForm

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the whole, experts first."""
        return (self.count, *self._one(0).shape)

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yields each expert's number, and its weights with a first dimension of 1."""
        for number in range(self.count):
            yield number, self._one(number)[None].contiguous().cpu()

    def _one(self, number: int) -> Tensor:
        if self.layer == FUSED[1]:
            down = self.read(number, DOWN)
            return down.t() if self.form.transposed else down
        return joined(self.read(number, GATE), self.read(number, UP), **self.form._asdict())


def stacks(layers: StoredLayers, *, base: Path) -> Callable[[ExpertTensor], ExpertStack | Tensor | None]:
    """Returns a source of the dequantized weights of experts, one by one or as 3-D parameters.

    Args:
        layers: Of the quantized base.
        base: Folder of the dense base.
    """
    names = {place: name for name in layers.names if (place := expert_tensor(name)) and place.number is not None}

    def source(place: ExpertTensor) -> ExpertStack | Tensor | None:
        if place.number is not None:
            name = names.get(place)
            return layers.dense(name) if name in layers.keys else None
        parts = (DOWN,) if place.layer == FUSED[1] else (GATE, UP)
        found = {key: name for key, name in names.items() if key.block == place.block and key.layer in parts}
        if not any(name in layers.keys for name in found.values()):
            return None

        def read(number: int, layer: str) -> Tensor:
            return layers.dense(names[ExpertTensor(place.block, number, layer)])

        return ExpertStack(count=len(found) // len(parts), read=read, layer=place.layer, form=expert_form(base))

    return source


@dataclass(frozen=True, slots=True)
class ExpertUpdates:
    """The updates of the experts in one 3-D parameter.

    Attributes:
        updates: By number and layer.
        shape: Of the parameter.
        form: How gate, up and down lie in it.
    """

    updates: dict[tuple[int, str], LowRank]
    shape: tuple[int, ...]
    form: ExpertForm

    def apply(self, first: int, weight: Tensor) -> Tensor:
        """Adds the updates to some experts and returns them.

        Args:
            first: Number of the expert in ``weight[0]``.
            weight: float32, with the experts in its first dimension.
        """
        return torch.stack([self._one(first + index, expert) for index, expert in enumerate(weight)])

    def _one(self, number: int, weight: Tensor) -> Tensor:
        transposed, interleaved = self.form
        if (number, DOWN) in self.updates:
            down = (weight.t() if transposed else weight).contiguous()
            changed = self.updates[number, DOWN].apply(0, down)
            return changed.t() if transposed else changed
        parts = halves(weight, transposed=transposed, interleaved=interleaved)
        updated = [
            self.updates[number, layer].apply(0, half.contiguous()) if (number, layer) in self.updates else half
            for layer, half in zip((GATE, UP), parts, strict=True)
        ]
        return joined(*updated, transposed=transposed, interleaved=interleaved)


def rename_expert_changes(
    changes: Mapping[str, Change], shapes: dict[str, tuple[int, ...]], *, base: Path
) -> dict[str, Change | ExpertUpdates]:
    """Returns the changes of experts' layers by the names of the checkpoint's tensors; a common one is for each expert.

    Args:
        changes: By the names of `finetune.quantization.experts`.
        shapes: Of the checkpoint's tensors.
        base: Folder of the checkpoint.

    Raises:
        MergeError: The checkpoint does not have an expert that the adapter changes.
    """
    places = {place: name for name in shapes if (place := expert_tensor(name))}
    renamed: dict[str, Change | ExpertUpdates] = {}
    for name, change in changes.items():
        changed = expert_tensor(name)
        assert changed is not None
        fused = places.get(ExpertTensor(changed.block, None, FUSED[1] if changed.layer == DOWN else FUSED[0]))
        count = shapes[fused][0] if fused else sum(place[::2] == changed[::2] for place in places)
        numbers = range(count) if changed.number is None else [changed.number]
        own = [places.get(changed._replace(number=number)) for number in numbers]
        if not fused and not (own and all(own)):
            raise MergeError(
                f"the adapter changes {name}, which {base} does not have; give the base that it was trained on"
            )
        renamed.update({key: change for key in own if key})
        if fused:
            updates = renamed.setdefault(fused, ExpertUpdates({}, shapes[fused], expert_form(base)))
            assert isinstance(updates, ExpertUpdates)
            assert isinstance(change, LowRank)
            updates.updates.update({(number, changed.layer): change for number in numbers})
    return renamed


def router_name(name: str, names: Iterable[str]) -> str | None:
    """Returns the checkpoint's name of a trained router's tensor: in the same decoder layer, with the same ending."""
    match = ROUTER.search(name)
    if match is None:
        return None
    similar = [other for other in names if (found := ROUTER.search(other)) and found.groups() == match.groups()]
    return similar[0] if len(similar) == 1 else None
