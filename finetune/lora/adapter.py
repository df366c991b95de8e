"""Attaches new adapters to a base: matches targets, prepares the base, initialises the variant, sets the dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, log
from finetune.errors import ModelError
from finetune.lora.config import ALL_LINEAR, LoraConfig

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel
    from torch import nn

MAGNITUDE = "lora_magnitude_vector"
"""peft's name of DoRA's vector of row lengths."""


def attach(
    model: Any,
    config: LoraConfig,
    *,
    upcast: str,
    checkpointing: bool,
    seed: int,
    calibration: Iterable[Sequence[int]] | None = None,
    original: Path | None = None,
    tokenizer: Any = None,
) -> PeftModel:
    """Prepares the base for training and attaches new adapters to it; the base's weights stay unchanged.

    Args:
        model: The base, from `model.load`.
        config: The lora group.
        upcast: ``model.upcast``.
        checkpointing: Whether activations are recomputed in the backward pass instead of saved.
        seed: Seed of the adapter's initial weights.
        calibration: Token ids of some training documents; only ``eva`` reads them.
        original: Folder of the unquantized base; only ``loftq`` reads it.
        tokenizer: Maps ``lora.tokens`` to ids; read only if there are any.

    Raises:
        ModelError: A target matches no linear layer (the message lists what the model has), a token is not in the
            vocabulary, or the variant lacks what it is initialised from.
    """
    import peft
    import torch
    from transformers import set_seed

    from finetune.lora import init
    from finetune.lora.experts import expert_targets, round_routers, router_names
    from finetune.quantization.qat import round_sums

    targets = match_targets(model, config.targets) | expert_targets(model, config.experts)
    routers = router_names(model) if config.routers else {}
    token_ids = trained_token_ids(model, config.tokens, tokenizer)
    directions = {}
    if config.variant == "eva":
        directions = init.input_directions(model, targets, documents=calibration, rank=config.rank, seed=seed)
    prepare_for_training(model, upcast=upcast, checkpointing=checkpointing)
    set_seed(seed)
    adapted = peft.get_peft_model(model, peft_config(config, targets, token_ids, routers))
    round_routers(adapted)
    round_sums(adapted)
    if config.variant == "eva":
        init.init_eva(adapted, directions)
    elif config.variant == "olora":
        init.init_olora(adapted, rank=config.rank)
    elif config.variant == "pissa":
        init.init_pissa(adapted, rank=config.rank)
    elif config.variant == "loftq":
        init.init_loftq(adapted, original, rank=config.rank)
    elif config.variant == "dora":
        init.init_dora(adapted, dtype=getattr(torch, config.dtype))
    if token_ids:
        _expose_head_bias(adapted)
    cast_adapter(adapted, config.dtype)
    _log_summary(adapted, config, targets | routers)
    return adapted


def peft_config(
    config: LoraConfig, targets: Iterable[str], token_ids: dict[str, list[int]], routers: Iterable[str] = ()
) -> PeftConfig:
    """Returns peft's configuration, without the initialisation: loading the saved adapter must not repeat it."""
    import peft

    return peft.LoraConfig(
        r=config.width,
        lora_alpha=config.alpha * (config.width // config.rank),  # type: ignore[arg-type]  # peft accepts a float
        lora_dropout=config.dropout,
        target_modules=sorted(targets),
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        trainable_token_indices=token_ids or None,
        modules_to_save=sorted(routers) or None,
        task_type="CAUSAL_LM",
    )


def _log_summary(adapted: nn.Module, config: LoraConfig, targets: dict[str, int]) -> None:
    matched = ", ".join(f"{name} x{count}" for name, count in sorted(targets.items()))
    parameters = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    doubled = config.width // config.rank
    count = sum(p.numel() // (doubled if "lora_" in name else 1) for name, p in parameters)
    size = human_bytes(sum(p.numel() * p.element_size() for _, p in parameters))
    kind = "" if config.variant == "lora" else f"{config.variant}, "
    tokens = f", and the embeddings of {', '.join(config.tokens)}" if config.tokens else ""
    saved = f", saved with rank {config.width} to subtract the initial update" if config.width != config.rank else ""
    log(
        "lora",
        f"{kind}rank {config.rank} on {matched}{tokens}: {count:,} trainable parameters, "
        f"{size} in {config.dtype}{saved}",
    )


def match_targets(model: nn.Module, targets: list[str]) -> dict[str, int]:
    """Counts the linear layers that each target matches, by the last segment of their names.

    Raises:
        ModelError: A target matches nothing, or peft would adapt experts in its place.
    """
    available = linear_layers(model)
    if targets == [ALL_LINEAR]:
        if not available:
            raise ModelError("lora.targets: this model has no linear layer besides its head, so nothing would train")
        _check_not_moved(model, set(available))
        return dict(available)
    unmatched = sorted(set(targets) - set(available))
    if unmatched:
        raise ModelError(
            f"lora.targets: {', '.join(unmatched)} match no linear layer. "
            f"This model has {', '.join(sorted(available))}."
        )
    _check_not_moved(model, set(targets))
    return {name: available[name] for name in targets}


def _check_not_moved(model: Any, targets: set[str]) -> None:
    """Refuses names that peft 0.21 takes for those of experts, which transformers 5 holds as 3-D parameters.

    It would then adapt every expert in 16 bit, and not the shared expert or the first layers that have these names.
    """
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    model_type = str(model.config.model_type)
    moved = targets & set(_MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), {}))
    if moved:
        raise ModelError(
            f"lora.targets: peft would adapt all experts of this {model_type} in place of {', '.join(sorted(moved))}; "
            f"set lora.targets=[{','.join(sorted(targets - moved))}]"
        )


def trained_token_ids(model: Any, tokens: list[str], tokenizer: Any) -> dict[str, list[int]]:
    """Returns the ids of ``lora.tokens`` by the name of the embedding; empty if there are none.

    Raises:
        ModelError: A token is not in the vocabulary.
    """
    if not tokens:
        return {}
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in vocabulary]
    if unknown:
        raise ModelError(
            f"lora.tokens: {', '.join(unknown)} not in the vocabulary of {len(vocabulary)} tokens; "
            "name tokens that it has, e.g. a reserved one"
        )
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    return {embedding.rpartition(".")[2]: sorted(vocabulary[token] for token in tokens)}


def _expose_head_bias(adapted: Any) -> None:
    """Gives peft 0.21's wrapper of a tied head the head's bias, which TRL 1.16 reads for its loss."""
    from peft.utils.other import TrainableTokensWrapper

    for module in adapted.modules():
        if isinstance(module, TrainableTokensWrapper):
            setattr(module, "bias", getattr(module.original_module, "bias", None))  # noqa: B010


def linear_layers(model: Any) -> Counter[str]:
    """Counts the linear layers that can be adapted, quantized or not, by the last segment of their names.

    The head is not counted, nor are experts, nor gates of width one, such as that of Qwen3.5's shared expert."""
    from finetune.quantization.experts import is_expert_layer

    head = model.get_output_embeddings()
    return Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and module.out_features > 1 and not is_expert_layer(name)
    )


def is_linear(module: Any) -> bool:
    """Returns whether a module is a linear layer, quantized or not."""
    from torch import nn

    from finetune.quantization.backends import backend_of

    return isinstance(module, nn.Linear) or backend_of(module) is not None


def prepare_for_training(model: Any, *, upcast: str, checkpointing: bool) -> None:
    """Calls peft's ``prepare_model_for_kbit_training``, but upcasts only what ``upcast`` names.

    peft casts every unquantized parameter to float32. For a frozen embedding of 128,000 rows that takes gigabytes
    without benefit, so those tensors are replaced by empty ones during the call."""
    import torch
    from peft import prepare_model_for_kbit_training

    excluded = {}
    for name, parameter in model.named_parameters():
        is_norm = parameter.dim() == 1 and "norm" in name.lower()
        plain = type(parameter) is torch.nn.Parameter and parameter.dtype in (torch.bfloat16, torch.float16)
        if plain and (upcast == "none" or (upcast == "norms" and not is_norm)):
            excluded[name] = parameter.data
            parameter.data = parameter.data.new_empty(0)
    prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    parameters = dict(model.named_parameters())
    for name, data in excluded.items():
        parameters[name].data = data


def cast_adapter(model: nn.Module, dtype: str) -> int:
    """Casts every trainable parameter to ``dtype``; returns how many changed.

    TRL 1.16 casts the trainable parameters of a quantized model to bfloat16 inside its trainer's ``__init__``, so this
    is called when the adapter is created and again after TRL's trainer is. DoRA's row lengths stay in float32, as in
    TRL: one step changes them by less than bfloat16 can represent."""
    import torch

    changed = 0
    for name, parameter in model.named_parameters():
        target = torch.float32 if MAGNITUDE in name else getattr(torch, dtype)
        if parameter.requires_grad and parameter.dtype != target:
            parameter.data = parameter.data.to(target)
            changed += 1
    return changed


def read_documents(folder: Path, *, tokens: int) -> list[list[int]]:
    """Returns the token ids of a training set's first documents, which EVA is initialised from.

    Args:
        folder: From the data stage: rows with ``input_ids`` and ``seq_lengths``.
        tokens: Total number of tokens; the last document is cut.
    """
    from datasets import load_from_disk

    documents: list[list[int]] = []
    left = tokens
    for pack in load_from_disk(str(folder)):
        start = 0
        for length in pack["seq_lengths"]:
            documents.append(pack["input_ids"][start : start + length][:left])
            start += length
            left -= len(documents[-1])
            if left <= 0:
                return documents
    return documents
