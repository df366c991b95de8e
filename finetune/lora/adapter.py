"""Puts fresh adapters on a base: targets matched, base prepared, variant chosen, numbers set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, log
from finetune.errors import ModelError
from finetune.lora.config import ALL_LINEAR, DOUBLED, LoraConfig

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel
    from torch import nn

MAGNITUDE = "lora_magnitude_vector"
"""DoRA's length of each row, as peft names it."""


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
    """Prepares the quantized base for training and puts fresh adapters on it; the base's weights stay as they are.

    Args:
        model: The base as `model.load` gave it.
        config: The lora group.
        upcast: ``model.upcast``.
        checkpointing: Whether activations are computed again in the backward pass instead of kept.
        seed: Seeds the adapter's first weights.
        calibration: Token ids of some training documents; only ``eva`` reads them.
        original: Folder of the unquantized base; only ``loftq`` reads it.
        tokenizer: Knows the ids of ``lora.tokens``; read only where there are any.

    Raises:
        ModelError: A target matches no linear layer (the message lists what the model has), a token is not in the
            vocabulary, or the variant lacks what it starts from.
    """
    import peft
    import torch
    from transformers import set_seed

    from finetune.lora import init

    targets = resolve(model, config.targets)
    rows = token_rows(model, config.tokens, tokenizer)
    inputs = {}
    if config.variant == "eva":
        inputs = init.input_directions(model, targets, documents=calibration, rank=config.rank, seed=seed)
    prepare(model, upcast=upcast, checkpointing=checkpointing)
    set_seed(seed)
    adapted = peft.get_peft_model(model, settings(config, targets, rows))
    if config.variant == "eva":
        init.init_eva(adapted, inputs)
    elif config.variant in DOUBLED:
        init.use_weight_parts(adapted, config.variant, rank=config.rank)
    elif config.variant == "loftq":
        init.init_loftq(adapted, original, rank=config.rank)
    elif config.variant == "dora":
        init.use_row_lengths(adapted, dtype=getattr(torch, config.dtype))
    if rows:
        _show_bias(adapted)
    cast_adapter(adapted, config.dtype)
    _say(adapted, config, targets)
    return adapted


def settings(config: LoraConfig, targets: Iterable[str], rows: dict[str, list[int]] | None = None) -> PeftConfig:
    """What peft is told. It is not told of the start, so loading the saved adapter never repeats one."""
    import peft

    return peft.LoraConfig(
        r=config.width,
        lora_alpha=config.alpha * (config.width // config.rank),  # type: ignore[arg-type]  # peft takes a float and says int
        lora_dropout=config.dropout,
        target_modules=sorted(targets),
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        trainable_token_indices=rows or None,
        task_type="CAUSAL_LM",
    )


def _say(adapted: nn.Module, config: LoraConfig, targets: dict[str, int]) -> None:
    matched = ", ".join(f"{name} x{count}" for name, count in sorted(targets.items()))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters) * config.rank // config.width
    size = human_bytes(sum(p.numel() * p.element_size() for p in parameters))
    kind = "" if config.variant == "lora" else f"{config.variant}, "
    rows = f", and the embeddings of {', '.join(config.tokens)}" if config.tokens else ""
    start = (
        f", with the start that is taken off again: rank {config.width} on disk" if config.width != config.rank else ""
    )
    log(
        "lora",
        f"{kind}rank {config.rank} on {matched}{rows}: {count:,} trainable parameters, {size} in {config.dtype}{start}",
    )


def resolve(model: nn.Module, wished: list[str]) -> dict[str, int]:
    """How many linear layers each target matches, by the last segment of their names.

    Raises:
        ModelError: A wish matches nothing.
    """
    available = linear_layers(model)
    if wished == [ALL_LINEAR]:
        if not available:
            raise ModelError("lora.targets: this model has no linear layer besides its head, so nothing would train")
        return dict(available)
    unmatched = sorted(set(wished) - set(available))
    if unmatched:
        raise ModelError(
            f"lora.targets: {', '.join(unmatched)} match no linear layer. This model has {', '.join(sorted(available))}."
        )
    return {name: available[name] for name in wished}


def token_rows(model: Any, tokens: list[str], tokenizer: Any) -> dict[str, list[int]]:
    """Rows of the embedding that are trained, by its name; empty where ``lora.tokens`` is.

    Raises:
        ModelError: A token is not in the vocabulary.
    """
    if not tokens:
        return {}
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in vocabulary]
    if unknown:
        raise ModelError(
            f"lora.tokens: {', '.join(unknown)} not in the vocabulary of {len(vocabulary)} tokens; name tokens that it has, e.g. one that "
            "it keeps in reserve"
        )
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    return {embedding.rpartition(".")[2]: sorted(vocabulary[token] for token in tokens)}


def _show_bias(adapted: Any) -> None:
    """TRL 1.16 asks the head for its bias while it computes the loss, and peft 0.21's wrapper of a tied head hides it."""
    from peft.utils.other import TrainableTokensWrapper

    for module in adapted.modules():
        if isinstance(module, TrainableTokensWrapper):
            setattr(module, "bias", getattr(module.original_module, "bias", None))  # noqa: B010


def linear_layers(model: Any) -> Counter[str]:
    """Linear layers but the head, quantized or not, counted by the last segment of their names."""
    head = model.get_output_embeddings()
    return Counter(
        name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module) and module is not head
    )


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer, quantized or not; most libraries' are `nn.Linear` too."""
    from torch import nn

    from finetune.quantization import library_of

    return isinstance(module, nn.Linear) or library_of(module) is not None


def prepare(model: Any, *, upcast: str, checkpointing: bool) -> None:
    """peft's ``prepare_model_for_kbit_training``, with the parts that ``upcast`` excludes set aside meanwhile.

    peft turns every unquantized parameter to float32. For a frozen embedding of 128,000 rows that costs gigabytes and
    buys nothing, so those tensors are swapped for empty ones while it works.
    """
    import torch
    from peft import prepare_model_for_kbit_training

    aside = {}
    for name, parameter in model.named_parameters():
        is_norm = parameter.dim() == 1 and "norm" in name.lower()
        plain = type(parameter) is torch.nn.Parameter and parameter.dtype in (torch.bfloat16, torch.float16)
        if plain and (upcast == "none" or (upcast == "norms" and not is_norm)):
            aside[name] = parameter.data
            parameter.data = parameter.data.new_empty(0)
    prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    parameters = dict(model.named_parameters())
    for name, data in aside.items():
        parameters[name].data = data


def cast_adapter(model: nn.Module, dtype: str) -> int:
    """Puts every trainable parameter into ``dtype``; returns how many changed.

    TRL 1.16 casts the trainable parameters of a quantized model to bfloat16 inside its trainer's ``__init__``, so this
    runs once when the adapter is made and once more after TRL's trainer is. DoRA's lengths stay in float32: one step
    changes them by less than bfloat16 can hold. TRL leaves them out too.
    """
    import torch

    changed = 0
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if MAGNITUDE in name else getattr(torch, dtype)
        if parameter.requires_grad and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
            changed += 1
    return changed
