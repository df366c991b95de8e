"""Reads what an adapter changes in each weight: LoRA, rsLoRA, DoRA, and tensors that were trained whole."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.errors import MergeError
from finetune.quantization.qat import add_update

if TYPE_CHECKING:
    from finetune.model import ModelSpec

PREFIX = "base_model.model."
UNSUPPORTED = (
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "alora_invocation_tokens",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
"""Settings of peft's LoraConfig with which a layer computes something other than W + s BA."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A low-rank update: W + scaling * B A; with a magnitude, each row is then scaled to that length (DoRA).

    Attributes:
        a: float32, shape (rank, columns of the layer's weight).
        b: float32, shape (rows of the layer's weight, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        transposed: The weight is stored (inputs, outputs), as in GPT-2's Conv1D or an embedding.
        magnitude: float32, shape (rows,), or None.
        start: The weight that B A is added to, where the adapter contains it (peft saves embeddings, which may have
            grown); None for the base's weight.
        exact_from: Dtype of the weight in memory, to which ``quantization=qat`` added B A in float64; None adds it to
            the float32 weight.
    """

    a: Tensor
    b: Tensor
    scaling: float
    transposed: bool = False
    magnitude: Tensor | None = None
    start: Tensor | None = None
    exact_from: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def apply(self, first: int, weight: Tensor) -> Tensor:
        """Adds the update to some rows of the old weight and returns them.

        Args:
            first: Index of ``weight[0]`` in the whole weight.
            weight: float32 rows of the old weight, shape (n, columns); may be changed in place.

        Source: peft 0.21.2, tuners/lora/layer.py (get_delta_weight, merge) and dora.py (norm over dim 1).
        """
        part = slice(first, first + len(weight))
        if self.exact_from is not None:
            return add_update(weight.to(self.exact_from).double(), self.a, self.b[part], self.scaling)
        if self.transposed:
            return weight.addmm_(self.a[:, part].T, self.b.T, alpha=self.scaling)
        weight.addmm_(self.b[part], self.a, alpha=self.scaling)
        if self.magnitude is None:
            return weight
        return weight.mul_((self.magnitude[part] / torch.linalg.norm(weight, dim=1))[:, None])


@dataclass(frozen=True, slots=True)
class ReplacedTensor:
    """A tensor that was trained as a whole (``modules_to_save``, biases) and replaces the old one."""

    value: Tensor


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """Single rows of an embedding that were trained (``trainable_token_indices``).

    Attributes:
        indices: Token ids, shape (n,).
        values: The new rows, shape (n, columns).
    """

    indices: Tensor
    values: Tensor


Change = LowRank | ReplacedTensor | EmbeddingRows


def read_changes(folder: Path) -> dict[str, Change]:
    """Reads what the adapter changes, by name of the tensor in the model: ``model.layers.0.mlp.up_proj.weight``.

    Raises:
        ModelError: The folder holds no adapter.
        MergeError: The kind of adapter, or one of its settings, cannot be written as new weights.
    """
    from safetensors.torch import load_file

    from finetune.inference.adapted import check_adapter

    check_adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    _check_supported(folder, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    changes: dict[str, Change] = {}
    used: set[str] = set()
    for key in tensors:
        for ending, kind in (("lora_A.weight", "linear"), ("lora_embedding_A", "embedding")):
            if key.endswith("." + ending):
                stem = key.removesuffix("." + ending)
                module = stem.removeprefix(PREFIX)
                update, keys = _low_rank(tensors, stem, config=config, module=module, embedding=kind == "embedding")
                changes[f"{module}.weight"] = update
                used |= keys
    indices = config.get("trainable_token_indices")
    for key in tensors.keys() - used:
        # Of an embedding that grew, peft also saves the tensor before and after training under these names.
        if ".original_module." not in key and ".modules_to_save." not in key:
            name, change = _whole_or_rows(key, tensors[key], indices)
            changes[name] = change
    return changes


def as_trained(changes: dict[str, Change], spec: ModelSpec, *, dtype: torch.dtype) -> dict[str, Change]:
    """Makes low-rank updates add up, to the bit, to the sums that ``quantization=qat`` rounded; others stay.

    Args:
        changes: By tensor name, from `read_changes`.
        spec: The base as it was loaded for training.
        dtype: Of the merged weights, and of the base's in training.
    """
    if not spec.is_rounded_with_adapter:
        return changes
    return {
        name: replace(change, exact_from=dtype) if isinstance(change, LowRank) else change
        for name, change in changes.items()
    }


def add_changes(changes: dict[str, Change], folder: Path, *, weight: float) -> dict[str, Change]:
    """Adds a further adapter's changes: a sum of low-rank updates is one low-rank update of the summed rank.

    Args:
        changes: Those of the adapters before; not modified.
        folder: A plain peft folder.
        weight: Factor of the further adapter's changes.

    Raises:
        MergeError: A change of a tensor that both adapters change is more than B A, or their shapes differ.
    """
    total = dict(changes)
    for name, further in read_changes(folder).items():
        present = changes.get(name)
        update = _plain_lora(further, name, folder)
        if present is None:
            total[name] = replace(update, scaling=weight * update.scaling)
            continue
        earlier = _plain_lora(present, name, folder)
        if earlier.shape != update.shape:
            raise MergeError(
                f"merge.adapters: {folder} has {name} as {update.shape} and the run's adapter as {earlier.shape}: "
                "another base; leave that adapter out"
            )
        b = torch.cat([earlier.scaling * earlier.b, weight * update.scaling * update.b], dim=1)
        total[name] = replace(earlier, a=torch.cat([earlier.a, update.a]), b=b, scaling=1.0)
    return total


def _plain_lora(change: Change, name: str, folder: Path) -> LowRank:
    if isinstance(change, LowRank) and change.magnitude is None and change.start is None:
        return change
    raise MergeError(
        f"merge.adapters: {name} is changed by {folder}, and not by plain LoRA alone (DoRA, or weights trained whole), "
        "so the changes cannot be added up; leave that adapter out"
    )


def _check_supported(folder: Path, config: dict[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise MergeError(
            f"{folder} is a {config['peft_type']} adapter; merging supports LORA (with rsLoRA and DoRA): export it "
            "as an adapter instead"
        )
    for name in UNSUPPORTED:
        if config.get(name):
            raise MergeError(
                f"{folder} uses peft's {name}, which merging does not support; export it as an adapter instead"
            )


def _low_rank(
    tensors: dict[str, Tensor], stem: str, *, config: dict[str, Any], module: str, embedding: bool
) -> tuple[LowRank, set[str]]:
    """Returns the update of one layer and the keys of its tensors."""
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    keys = {f"{stem}.{name}" for name in names}
    if f"{stem}.lora_B.bias" in tensors:
        raise MergeError(
            f"{module} was trained with peft's lora_bias, which merging does not support; export it as an adapter "
            "instead"
        )
    a, b = (tensors[f"{stem}.{name}"].float() for name in names)
    if a.dim() != 2 or b.dim() != 2:
        raise MergeError(
            f"{module} is a convolution ({tuple(a.shape)}); merging supports linear layers and embeddings: export it "
            "as an adapter instead"
        )
    magnitude = None
    for name in (f"{stem}.lora_magnitude_vector", f"{stem}.lora_magnitude_vector.weight"):
        if name in tensors:
            magnitude = tensors[name].float().reshape(-1)
            keys.add(name)
    start = tensors.get(f"{stem}.base_layer.weight")
    keys.add(f"{stem}.base_layer.weight")
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    if magnitude is not None and transposed:
        raise MergeError(
            f"{module} was trained with DoRA on a transposed weight, which merging does not support; export it as an "
            "adapter instead"
        )
    scaling = _scaling(config, module, rank=a.shape[0])
    return LowRank(a=a, b=b, scaling=scaling, transposed=transposed, magnitude=magnitude, start=start), keys


def _scaling(config: dict[str, Any], module: str, *, rank: int) -> float:
    alpha = config["lora_alpha"]
    if patterns := config.get("alpha_pattern"):
        from peft.utils.other import get_pattern_key  # takes seconds to import, and few adapters need it

        alpha = patterns.get(get_pattern_key(list(patterns), module), alpha)
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _whole_or_rows(key: str, value: Tensor, indices: Any) -> tuple[str, Change]:
    name = key.removeprefix(PREFIX)
    if ".token_adapter." in name:
        module = name.split(".token_adapter.")[0]
        wanted = indices.get(module.rpartition(".")[2], indices.get(module)) if isinstance(indices, dict) else indices
        if wanted is None or len(wanted) != len(value):
            raise MergeError(
                f"{module}: the adapter holds {len(value)} trained rows and its config names other rows; save the "
                "adapter again"
            )
        return f"{module}.weight", EmbeddingRows(indices=torch.tensor(wanted), values=value)
    if "lora_" in name:
        raise MergeError(f"the adapter holds {name}, which merging does not support; export it as an adapter instead")
    return name, ReplacedTensor(value=value)
