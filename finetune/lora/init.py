"""Initialises adapters other than with random A and zero B: from the weights, the layers' inputs, the rounding errors.

Merging, evaluation and loading rebuild the base from disk, so an initialisation must not change it. OLoRA and PiSSA as
published do: they subtract B0 A0 from the weight. Here B0 A0 is subtracted by frozen columns of the same adapter:

    W + s [B, -B0] [A; A0],  A = A0 and B = B0 at the start.

For the same A and B this is the published layer W - s B0 A0 + s B A, with two advantages: it is a plain LoRA of twice
the rank (the form that peft converts to when it saves), and a quantized W is not rounded a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.lora.adapter import is_linear

PREFIX = "base_model.model."
ADAPTER = "default"
POWER_ITERATIONS = 16
"""Of the randomised SVD: the most that PiSSA's paper tries, as good as the exact SVD. Source: arXiv 2404.02948."""

BATCH_TOKENS = 1024
"""Of one pass for EVA. Each pass needs a small SVD per layer, which takes most of the time."""


def init_olora(adapted: Any, *, rank: int) -> None:
    """Initialises every layer of a model of twice the rank with the first columns of Q and rows of R in W = Q R.

    The first columns of Q depend on the first columns of W only, so the others are not decomposed.

    Source: OLoRA, arXiv 2406.01775; not scaled, as in peft 0.21.2.
    """
    for layer, weight in _base_weights(adapted, rank):
        b = torch.linalg.qr(weight[:, :rank])[0]
        _set_cancelling(layer, b, b.T @ weight)


def init_pissa(adapted: Any, *, rank: int) -> None:
    """Initialises every layer of a model of twice the rank with its weight's largest singular vectors.

    Source: PiSSA, arXiv 2404.02948.
    """
    for layer, weight in _base_weights(adapted, rank):
        _set_cancelling(layer, *low_rank_factors(weight, rank, scaling=layer.scaling[ADAPTER]))


def _base_weights(adapted: Any, rank: int) -> Iterator[tuple[Any, Tensor]]:
    for name, layer in lora_layers(adapted).items():
        weight = dense_weight(layer.get_base_layer())
        check_rank(name, rank, min(weight.shape))
        yield layer, weight


def _set_cancelling(layer: Any, b: Tensor, a: Tensor) -> None:
    """Sets [B, -B] and [A; A], of which the second halves stay frozen."""
    set_weights(layer, torch.cat([b, -b], dim=1), torch.cat([a, a]))
    freeze_half(layer.lora_A[ADAPTER].weight, dimension=0, first=len(a))
    freeze_half(layer.lora_B[ADAPTER].weight, dimension=1, first=len(a))


def low_rank_factors(weight: Tensor, rank: int, *, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns B and A of equal size, with scaling * B A the best approximation of that rank."""
    u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=POWER_ITERATIONS)
    root = (s[:rank] / scaling).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:, :rank].T


def freeze_half(parameter: Tensor, *, dimension: int, first: int) -> None:
    """Zeroes the gradient beyond ``first``: without weight decay, no optimizer moves a weight whose gradient is always
    0.

    A hook on one parameter is used instead of two parameters, so that the saved adapter equals the trained one.
    """

    def keep_first(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept.narrow(dimension, first, kept.shape[dimension] - first).zero_()
        return kept

    parameter.register_hook(keep_first)


def init_loftq(adapted: Any, original: Path | None, *, rank: int) -> None:
    """Initialises LoftQ: s B A is the best approximation of each weight's quantization error.

    One iteration only: further ones would quantize another weight than the one on disk.

    Raises:
        ModelError: The unquantized weights are missing, or a layer is not quantized to 4 bits.

    Source: LoftQ, arXiv 2310.08659, algorithm 1; peft 0.21.2, utils/loftq_utils.py (replace_lora_weights_loftq).
    """
    from peft.utils.integrations import get_bnb_param_type

    if original is None:
        raise ModelError(
            "lora.variant=loftq needs the folder of the unquantized base; give `attach` original=base.folder"
        )
    read_original = checkpoint_reader(original)
    for name, layer in lora_layers(adapted).items():
        base = layer.get_base_layer()
        if get_bnb_param_type(base.weight) != "4bit":
            raise ModelError(
                f"lora.variant=loftq: {name} is not in 4 bits, so it has no rounding error to correct; "
                "use quantization=nf4"
            )
        rounded = dense_weight(base)
        check_rank(name, rank, min(rounded.shape))
        error = read_original(f"{name}.weight").to(rounded.device, torch.float32) - rounded
        set_weights(layer, *low_rank_factors(error, rank, scaling=layer.scaling[ADAPTER]))


def checkpoint_reader(folder: Path, *, setting: str = "lora.variant=loftq") -> Callable[[str], Tensor]:
    """Returns a function that reads a tensor of a dense checkpoint by its name in the model.

    Args:
        folder: Of the dense base.
        setting: The setting that needs it, for messages.

    Raises:
        ModelError: The folder has no safetensors file; the function: no tensor, or several, match the name.
    """
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    if not files:
        raise ModelError(f"{setting}: {folder} has no *.safetensors file, so the quantization error is unknown")

    def read(name: str) -> Tensor:
        alike = [other for other in files if name.endswith("." + other) or other.endswith("." + name)]
        matches = [name] if name in files else alike
        if len(matches) != 1:
            raise ModelError(
                f"{setting}: {folder} has {len(matches)} tensors called {name}, so its rounding error is unknown; "
                "leave this setting out"
            )
        with safe_open(files[matches[0]], "pt") as opened:
            tensor: Tensor = opened.get_tensor(matches[0])
        return tensor

    return read


def input_directions(
    model: Any, targets: Iterable[str], *, documents: Iterable[Sequence[int]] | None, rank: int, seed: int
) -> dict[str, Tensor]:
    """Returns EVA's A for every target by the layer's name: the main directions of the layer's inputs on the data.

    Every layer gets the same rank. EVA can also redistribute ranks between layers (rho > 1), but then neither the
    memory nor the trained layers would be known before the data is read. Uses peft's incremental PCA in one pass.

    Args:
        model: The base, in evaluation mode.
        targets: Last segments of the layers' names.
        documents: Token ids.
        rank: Number of directions.
        seed: Of the randomised SVD.

    Raises:
        ModelError: There are too few tokens.

    Source: EVA, arXiv 2410.07170; peft 0.21.2, tuners/lora/eva.py (SVDHook).
    """
    rows = [list(document) for document in documents or ()]
    tokens = sum(map(len, rows))
    if tokens < 2 * rank:
        raise ModelError(
            f"lora.variant=eva needs at least {2 * rank} tokens of training documents to find {rank} directions; "
            f"got {tokens}: give more rows, lower lora.rank, or use lora.variant=lora"
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
    """Returns the linear layers that the targets match, without the head, by their full names."""
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
    """Updates the PCA. Returns nothing, because a hook's return value would replace the input."""
    pca.partial_fit(inputs.float())


def init_eva(adapted: Any, directions: dict[str, Tensor]) -> None:
    """Sets A to the result of `input_directions`; B stays zero."""
    for name, layer in lora_layers(adapted).items():
        layer.lora_A[ADAPTER].weight.data.copy_(directions[name])


def batches(documents: list[list[int]], *, tokens: int) -> list[dict[str, Tensor]]:
    """Returns padded batches of at least ``tokens`` tokens each; a smaller rest joins the last batch.

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
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    tensors = [[torch.tensor(document) for document in group] for group in groups]
    return [{"input_ids": pad(rows), "attention_mask": pad([torch.ones_like(row) for row in rows])} for rows in tensors]


def init_dora(adapted: Any, *, dtype: torch.dtype) -> None:
    """Computes DoRA's row lengths in the dtype of the adapter, so that the first forward pass equals the base's.

    peft computes them in the base's dtype: bfloat16 lengths with a float32 adapter scale every row by up to 0.4 %.
    """
    for layer in lora_layers(adapted).values():
        lengths = torch.linalg.norm(dense_weight(layer.get_base_layer()).to(dtype), dim=1)
        layer.lora_magnitude_vector[ADAPTER].weight.data = lengths.float()


def dense_weight(layer: Any) -> Tensor:
    """Returns a layer's weight as it multiplies, float32, shape (outputs, inputs).

    peft's own function is not used: it moves an int8 weight, which on a CPU loses the layer's scales.
    """
    from finetune.quantization.backends import dense

    return dense(layer, torch.float32).detach()


def lora_layers(adapted: Any) -> dict[str, Any]:
    """Returns peft's layers by the name that they have in the base."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)
    }


def set_weights(layer: Any, b: Tensor, a: Tensor) -> None:
    """Copies B and A into a layer's float32 matrices."""
    layer.lora_A[ADAPTER].weight.data.copy_(a)
    layer.lora_B[ADAPTER].weight.data.copy_(b)


def check_rank(name: str, rank: int, largest: int) -> None:
    """Checks that the rank is at most that of the weight.

    Raises:
        ModelError: It is larger.
    """
    if rank > largest:
        raise ModelError(
            f"lora.rank={rank}: {name} has only {largest} directions to initialise from; "
            f"use at most lora.rank={largest}"
        )
