"""Where adapters start, if not at A random and B zero: parts of the weight, the layer's inputs, the rounding errors.

The base on disk is what merging, evaluation and loading rebuild, so no start may change it. OLoRA and PiSSA as published
do: they take B0 A0 out of the weight. Here that is kept beside it, as frozen columns of the same adapter:

    W + s [B, -B0] [A; A0],  A = A0 and B = B0 at the start.

For the same A and B this is the published layer W - s B0 A0 + s B A, with two gains: it is a plain LoRA of twice the rank
(the form that peft converts to when it saves), and a quantized W is not rounded a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.lora.adapter import is_linear

PREFIX = "base_model.model."
ADAPTER = "default"
POWER_ITERATIONS = 16
"""Of the randomised SVD: the most that PiSSA's paper tries, there as good as the exact one. Source: arXiv 2404.02948."""

BATCH_TOKENS = 1024
"""Of a pass for EVA: each costs one small SVD a layer, and those are most of its time."""


def use_weight_parts(adapted: Any, variant: str, *, rank: int) -> None:
    """OLoRA's or PiSSA's start on every layer; the second half of A's rows and B's columns stays at it.

    Args:
        adapted: A `PeftModel` of twice the rank.
        variant: ``olora`` or ``pissa``.
        rank: Of one half.
    """
    for name, layer in lora_layers(adapted).items():
        weight = dense_weight(layer.get_base_layer())
        check_rank(name, rank, min(weight.shape))
        scaling = layer.scaling[ADAPTER]
        b, a = orthogonal_part(weight, rank) if variant == "olora" else principal_part(weight, rank, scaling=scaling)
        place(layer, torch.cat([b, -b], dim=1), torch.cat([a, a]))
        freeze_half(layer.lora_A[ADAPTER].weight, dimension=0, first=rank)
        freeze_half(layer.lora_B[ADAPTER].weight, dimension=1, first=rank)


def orthogonal_part(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """First columns of Q and first rows of R in W = Q R. Source: OLoRA, arXiv 2406.01775; not scaled, as in peft 0.21.2.

    The first columns of Q depend on the first columns of W alone, so the rest is never decomposed.
    """
    b = torch.linalg.qr(weight[:, :rank])[0]
    return b, b.T @ weight


def principal_part(weight: Tensor, rank: int, *, scaling: float) -> tuple[Tensor, Tensor]:
    """B and A with scaling * B A the best approximation of that rank, shared evenly. Source: PiSSA, arXiv 2404.02948."""
    u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=POWER_ITERATIONS)
    root = (s[:rank] / scaling).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:, :rank].T


def freeze_half(parameter: Tensor, *, dimension: int, first: int) -> None:
    """Zeroes the gradient beyond ``first``: without weight decay, no optimizer of ours moves a weight whose gradient was
    always 0. One parameter with a hook, and not two, because the saved adapter and the trained one must be the same."""

    def keep_first(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept.narrow(dimension, first, kept.shape[dimension] - first).zero_()
        return kept

    parameter.register_hook(keep_first)


def init_loftq(adapted: Any, original: Path | None, *, rank: int) -> None:
    """LoftQ's start: s B A is the best approximation of what quantization took from each weight.

    One iteration. Further ones quantize another weight than the one on disk. Source: LoftQ, arXiv 2310.08659, algorithm 1;
    peft 0.21.2, utils/loftq_utils.py (replace_lora_weights_loftq).

    Raises:
        ModelError: The unquantized weights are not at hand, or nothing is quantized.
    """
    from peft.utils.integrations import get_bnb_param_type

    if original is None:
        raise ModelError(
            "lora.variant=loftq needs the folder of the unquantized base; give `attach` original=base.folder"
        )
    read = reader(original)
    for name, layer in lora_layers(adapted).items():
        base = layer.get_base_layer()
        if get_bnb_param_type(base.weight) != "4bit":
            raise ModelError(
                f"lora.variant=loftq: {name} is not in 4 bits, so it has no rounding error to start at; use quantization=nf4"
            )
        rounded = dense_weight(base)
        check_rank(name, rank, min(rounded.shape))
        error = read(f"{name}.weight").to(rounded.device, torch.float32) - rounded
        b, a = principal_part(error, rank, scaling=layer.scaling[ADAPTER])
        place(layer, b, a)


def reader(folder: Path, *, wish: str = "lora.variant=loftq") -> Callable[[str], Tensor]:
    """A function that gives a dense checkpoint's tensor by the name that it has in the model.

    Args:
        folder: The dense base's.
        wish: The setting that needs it, for messages.

    Raises:
        ModelError: The folder has no safetensors; the function: no tensor, or several, of that name.
    """
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    if not files:
        raise ModelError(f"{wish}: {folder} holds no *.safetensors file, so what quantization took is not known")

    def read(name: str) -> Tensor:
        near = (
            [name]
            if name in files
            else [other for other in files if name.endswith("." + other) or other.endswith("." + name)]
        )
        if len(near) != 1:
            raise ModelError(
                f"{wish}: {folder} has {len(near)} tensors called {name}, so its rounding error is not known; do without it"
            )
        with safe_open(files[near[0]], "pt") as opened:
            tensor: Tensor = opened.get_tensor(near[0])
        return tensor

    return read


def input_directions(
    model: Any, targets: Iterable[str], *, documents: Iterable[Sequence[int]] | None, rank: int, seed: int
) -> dict[str, Tensor]:
    """EVA's A for every target: the main directions of the layer's inputs on the data, by the layer's name.

    Every layer gets the same rank: EVA may also move rank from layer to layer (rho > 1), and then neither memory nor the
    layers that train would be known before the data are read. One pass, by peft's incremental PCA.

    Args:
        model: The bare base, in evaluation mode.
        targets: Last segments of the layers' names.
        documents: Token ids.
        rank: Directions wanted.
        seed: Of the randomised SVD.

    Raises:
        ModelError: No documents, or too short.

    Source: EVA, arXiv 2410.07170; peft 0.21.2, tuners/lora/eva.py (SVDHook).
    """
    rows = [list(document) for document in documents or ()]
    found = sum(map(len, rows))
    if found < 2 * rank:
        raise ModelError(
            f"lora.variant=eva needs at least {2 * rank} tokens of training documents to find {rank} directions; got {found}: "
            "give more rows, lower lora.rank, or use lora.variant=lora"
        )
    components = {
        name: _components(module.in_features, name, rank=rank, seed=seed)
        for name, module in matching(model, targets).items()
    }
    mask = torch.empty(0)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, pca=pca: _fit(pca, inputs[0][mask]))
        for name, pca in components.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches(rows, tokens=max(BATCH_TOKENS, 2 * rank)):
                mask = batch["attention_mask"].bool().to(model.device)
                model.base_model(**{key: value.to(model.device) for key, value in batch.items()}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: pca.components_ for name, pca in components.items()}


def matching(model: Any, targets: Iterable[str]) -> dict[str, torch.nn.Linear]:
    """The linear layers that the targets name, the head left out, by their full names."""
    wanted, head = set(targets), model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in wanted and is_linear(module) and module is not head
    }


def _components(features: int, name: str, *, rank: int, seed: int) -> Any:
    from peft.utils.incremental_pca import IncrementalPCA

    check_rank(name, rank, features)
    width = min(2 * rank, features)
    return IncrementalPCA(
        n_components=rank, lowrank=True, lowrank_q=width, lowrank_niter=POWER_ITERATIONS, lowrank_seed=seed
    )


def _fit(pca: Any, inputs: Tensor) -> None:
    """Returns nothing: what a hook returns takes the input's place."""
    pca.partial_fit(inputs.float())


def init_eva(adapted: Any, directions: dict[str, Tensor]) -> None:
    """A as `input_directions` found it; B stays at zero."""
    for name, layer in lora_layers(adapted).items():
        layer.lora_A[ADAPTER].weight.data.copy_(directions[name])


def batches(documents: list[list[int]], *, tokens: int) -> list[dict[str, Tensor]]:
    """Padded batches of at least so many tokens each; a rest that is smaller joins the last batch.

    Returns:
        ``input_ids`` and ``attention_mask``, shape (documents, longest) each; padding is masked and to the right.
    """
    groups: list[list[list[int]]] = []
    full = True
    for document in documents:
        if full:
            groups.append([])
        groups[-1].append(document)
        full = sum(map(len, groups[-1])) >= tokens
    if not full and len(groups) > 1:
        rest = groups.pop()
        groups[-1] += rest
    return [_padded(group) for group in groups]


def _padded(documents: list[list[int]]) -> dict[str, Tensor]:
    rows = [torch.tensor(document) for document in documents]
    masks = [torch.ones_like(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": pad(rows, batch_first=True), "attention_mask": pad(masks, batch_first=True)}


def use_row_lengths(adapted: Any, *, dtype: torch.dtype) -> None:
    """DoRA's lengths, as the forward pass in these numbers finds them at the start, so that it starts at the base.

    peft takes them in the base's numbers: bfloat16 lengths under a float32 adapter scale every row by up to 0.4 %.
    """
    for layer in lora_layers(adapted).values():
        lengths = torch.linalg.norm(dense_weight(layer.get_base_layer()).to(dtype), dim=1)
        layer.lora_magnitude_vector[ADAPTER].weight.data = lengths.float()


def dense_weight(layer: Any) -> Tensor:
    """A layer's weight as it multiplies, float32, shape (outputs, inputs).

    peft's own function is not used: it moves an int8 weight, and on a CPU the layer then has lost its scales.
    """
    from finetune.quantization import dense

    return dense(layer, torch.float32).detach()


def lora_layers(adapted: Any) -> dict[str, Any]:
    """peft's layers by the name that they have in the base."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)
    }


def place(layer: Any, b: Tensor, a: Tensor) -> None:
    """Copies a start into a layer's float32 matrices."""
    layer.lora_A[ADAPTER].weight.data.copy_(a)
    layer.lora_B[ADAPTER].weight.data.copy_(b)


def check_rank(name: str, rank: int, largest: int) -> None:
    """A start has at most as many directions as the weight.

    Raises:
        ModelError: More are wanted.
    """
    if rank > largest:
        raise ModelError(
            f"lora.rank={rank}: {name} has only {largest} directions to start at; use at most lora.rank={largest}"
        )
