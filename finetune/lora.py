"""The adapter: which linear layers learn, in how many columns, and proof that every target matched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, say
from finetune.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

ALL_LINEAR = "all-linear"


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Which weights learn, and how much room they get."""

    rank: int
    """Columns of A, rows of B. Adapter memory grows linearly with it."""

    alpha: float
    """The update is scaled by ``alpha / rank``; keep the ratio when you change the rank."""

    dropout: float
    """Share of the adapter's inputs zeroed while training, 0 to below 1."""

    targets: list[str]
    """Last name segments of the linear layers to adapt, e.g. ``q_proj``; ``all-linear`` takes all but the head."""

    dtype: str
    """Numbers of the adapter: ``float32`` keeps small updates that ``bfloat16`` rounds away."""

    def problems(self) -> Iterator[str]:
        if self.rank < 1:
            yield f"lora.rank must be at least 1; got {self.rank}"
        if self.alpha <= 0:
            yield f"lora.alpha must be positive, or the adapter has no effect; got {self.alpha}"
        if not 0 <= self.dropout < 1:
            yield f"lora.dropout must be at least 0 and below 1; got {self.dropout}"
        if not self.targets:
            yield "lora.targets is empty, so nothing would train; name a layer, e.g. [q_proj, v_proj], or [all-linear]"
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            yield f"lora.targets: {ALL_LINEAR} already takes every linear layer; got {self.targets}: leave the others out"
        if self.dtype not in ("float32", "bfloat16"):
            yield f"lora.dtype must be float32 or bfloat16; got {self.dtype!r}"


def attach(model: Any, config: LoraConfig, *, upcast: str, checkpointing: bool, seed: int) -> PeftModel:
    """Prepares the quantized base for training and puts fresh adapters on it.

    Args:
        model: The base as `model.load` gave it.
        config: The lora group.
        upcast: ``model.upcast``.
        checkpointing: Whether activations are computed again in the backward pass instead of kept.
        seed: Seeds the adapter's first weights.

    Raises:
        ModelError: A target matches no linear layer; the message lists what the model has.
    """
    import peft
    import torch
    from transformers import set_seed

    targets = resolve(model, config.targets)
    prepare(model, upcast=upcast, checkpointing=checkpointing)
    set_seed(seed)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft takes a float and says int
        lora_dropout=config.dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, settings)
    cast_adapter(adapted, config.dtype)
    matched = ", ".join(f"{name} x{count}" for name, count in sorted(targets.items()))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    size = human_bytes(trainable * getattr(torch, config.dtype).itemsize)
    say("lora", f"rank {config.rank} on {matched}: {trainable:,} trainable parameters, {size} in {config.dtype}")
    return adapted


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
        raise ModelError(f"lora.targets: {', '.join(unmatched)} match no linear layer. This model has {', '.join(sorted(available))}.")
    return {name: available[name] for name in wished}


def linear_layers(model: Any) -> Counter[str]:
    """Linear layers but the head, counted by the last segment of their names. Quantized ones are `nn.Linear` too."""
    from torch import nn

    head = model.get_output_embeddings()
    return Counter(
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    )


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
        if (upcast == "none" or (upcast == "norms" and not is_norm)) and parameter.dtype in (torch.bfloat16, torch.float16):
            aside[name] = parameter.data
            parameter.data = parameter.data.new_empty(0)
    prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None
    )
    parameters = dict(model.named_parameters())
    for name, data in aside.items():
        parameters[name].data = data


def cast_adapter(model: nn.Module, dtype: str) -> int:
    """Puts every trainable parameter into ``dtype``; returns how many changed.

    TRL 1.16 casts the trainable parameters of a quantized model to bfloat16 inside its trainer's ``__init__``, so this
    runs once when the adapter is made and once more after TRL's trainer is.
    """
    import torch

    changed = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != getattr(torch, dtype):
            parameter.data = parameter.data.to(getattr(torch, dtype))
            changed += 1
    return changed
