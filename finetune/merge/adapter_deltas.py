"""What an adapter does to each weight, read from its peft folder: LoRA, rsLoRA, DoRA, and tensors that were trained whole."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import MergeError

PREFIX = "base_model.model."
REFUSED = (
    "layer_replication", "target_parameters", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "alora_invocation_tokens",
    "monteclora_config", "velora_config", "megatron_config",
)  # fmt: skip
"""Settings of peft's LoraConfig under which the layer computes something else than W + s BA."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + scaling * B A, by rows of W; with a magnitude, each row is then scaled to that length (DoRA).

    Attributes:
        a: float32, shape (rank, columns of the layer's weight).
        b: float32, shape (rows of the layer's weight, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        transposed: The weight is stored (inputs, outputs), as in GPT-2's Conv1D or an embedding.
        magnitude: float32, shape (rows,), or None.
        start: The weight that B A is added to, where the adapter brings it along (peft does for embeddings, which may
            have grown); None for the base's own.
    """

    a: Tensor
    b: Tensor
    scaling: float
    transposed: bool = False
    magnitude: Tensor | None = None
    start: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def apply(self, first: int, weight: Tensor) -> Tensor:
        """Rows of the new weight.

        Args:
            first: Which row of the whole weight is ``weight[0]``.
            weight: float32 rows of the old weight, shape (n, columns); changed in place.

        Source: peft 0.21.2, tuners/lora/layer.py (get_delta_weight, merge) and dora.py (norm over dim 1).
        """
        part = slice(first, first + len(weight))
        if self.transposed:
            return weight.addmm_(self.a[:, part].T, self.b.T, alpha=self.scaling)
        weight.addmm_(self.b[part], self.a, alpha=self.scaling)
        if self.magnitude is None:
            return weight
        return weight.mul_((self.magnitude[part] / torch.linalg.norm(weight, dim=1))[:, None])


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that was trained as a whole (``modules_to_save``, biases) and takes the old one's place."""

    value: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of an embedding that were trained (``trainable_token_indices``).

    Attributes:
        indices: Which rows, shape (n,).
        values: Their new contents, shape (n, columns).
    """

    indices: Tensor
    values: Tensor


Change = LowRank | Whole | Rows


def read_changes(folder: Path) -> dict[str, Change]:
    """What the adapter changes, by the name of the tensor in the model, e.g. ``model.layers.0.mlp.up_proj.weight``.

    Raises:
        ModelError: The folder holds no adapter.
        MergeError: A kind of adapter, or a setting, that cannot be written as new weights.
    """
    from safetensors.torch import load_file

    from finetune.inference.adapted import check_adapter

    check_adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    _check(folder, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    changes: dict[str, Change] = {}
    used = set()
    for key in tensors:
        for ending, kind in (("lora_A.weight", "linear"), ("lora_embedding_A", "embedding")):
            if key.endswith("." + ending):
                stem = key.removesuffix("." + ending)
                module = stem.removeprefix(PREFIX)
                change, keys = _low_rank(tensors, stem, config=config, module=module, embedding=kind == "embedding")
                changes[f"{module}.weight"] = change
                used |= keys
    indices = config.get("trainable_token_indices")
    # An embedding that grew is saved by peft as it was and as it was trained, besides the tensor that counts.
    for key in (
        key for key in tensors.keys() - used if ".original_module." not in key and ".modules_to_save." not in key
    ):
        name, other = _other(key, tensors[key], indices)
        changes[name] = other
    return changes


def add_changes(changes: dict[str, Change], folder: Path, *, weight: float) -> dict[str, Change]:
    """The changes with a further adapter's added: a sum of low-rank changes is one of the summed rank.

    Args:
        changes: So far; left as they are.
        folder: A plain peft folder.
        weight: Of the further adapter's change.

    Raises:
        MergeError: One of two changes of a tensor is more than B A, or they are for weights of different shapes.
    """
    together = dict(changes)
    for name, other in read_changes(folder).items():
        own = changes.get(name)
        for change in (own, other):
            if change is not None and not _adds_up(change):
                raise MergeError(
                    f"merge.adapters: {name} is changed by {folder}, and not by plain LoRA alone (DoRA, or weights trained whole), so the "
                    "changes cannot be added up; leave that adapter out"
                )
        assert isinstance(other, LowRank)
        if own is None:
            together[name] = replace(other, scaling=weight * other.scaling)
            continue
        assert isinstance(own, LowRank)
        if own.shape != other.shape:
            raise MergeError(
                f"merge.adapters: {folder} has {name} as {other.shape} and the run's adapter as {own.shape}: another base"
            )
        b = torch.cat([own.scaling * own.b, weight * other.scaling * other.b], dim=1)
        together[name] = replace(own, a=torch.cat([own.a, other.a]), b=b, scaling=1.0)
    return together


def _adds_up(change: Change) -> bool:
    return isinstance(change, LowRank) and change.magnitude is None and change.start is None


def _check(folder: Path, config: dict[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise MergeError(
            f"{folder} is a {config['peft_type']} adapter; merging knows LORA (with rsLoRA and DoRA): ship it as an adapter instead"
        )
    for name in REFUSED:
        if config.get(name):
            raise MergeError(
                f"{folder} uses peft's {name}, which is no change of weights that merging knows; ship it as an adapter instead"
            )


def _low_rank(
    tensors: dict[str, Tensor], stem: str, *, config: dict[str, Any], module: str, embedding: bool
) -> tuple[LowRank, set[str]]:  # fmt: skip
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    keys = {f"{stem}.{name}" for name in names}
    if f"{stem}.lora_B.bias" in tensors:
        raise MergeError(
            f"{module} was trained with peft's lora_bias, which merging does not know; ship it as an adapter instead"
        )
    a, b = (tensors[f"{stem}.{name}"].float() for name in names)
    if a.dim() != 2 or b.dim() != 2:
        raise MergeError(
            f"{module} is a convolution ({tuple(a.shape)}); merging knows linear layers and embeddings: ship it as an adapter"
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
            f"{module} was trained with DoRA on a transposed weight, which merging does not know; ship it as an adapter instead"
        )
    scaling = _scaling(config, module, rank=a.shape[0])
    return LowRank(a=a, b=b, scaling=scaling, transposed=transposed, magnitude=magnitude, start=start), keys


def _scaling(config: dict[str, Any], module: str, *, rank: int) -> float:
    alpha = config["lora_alpha"]
    if patterns := config.get("alpha_pattern"):
        from peft.utils.other import get_pattern_key  # seconds, which few adapters need

        alpha = patterns.get(get_pattern_key(list(patterns), module), alpha)
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _other(key: str, value: Tensor, indices: Any) -> tuple[str, Change]:
    name = key.removeprefix(PREFIX)
    if ".token_adapter." in name:
        module = name.split(".token_adapter.")[0]
        wanted = indices.get(module.rpartition(".")[2], indices.get(module)) if isinstance(indices, dict) else indices
        if wanted is None or len(wanted) != len(value):
            raise MergeError(
                f"{module}: the adapter holds {len(value)} trained rows and its config names other ones; save the adapter again"
            )
        return f"{module}.weight", Rows(indices=torch.tensor(wanted), values=value)
    if "lora_" in name:
        raise MergeError(f"the adapter holds {name}, which merging does not know; ship it as an adapter instead")
    return name, Whole(value=value)
