"""Optimizer and schedule: what the user may name, and what it becomes where there is no paging."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

UNPAGED = {
    "paged_adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "adamw_torch",
    "paged_lion_8bit": "lion_8bit",
    "paged_lion_32bit": "lion_32bit",
}
"""The same optimizer with its states in ordinary memory."""

OPTIMIZERS = (*UNPAGED, *UNPAGED.values())
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine", "wsd": "warmup_stable_decay"}
"""Our names to transformers'; with a warmup of 0, ``constant_with_warmup`` is constant."""

UNDECAYED = ("lora_magnitude_vector", "bias", "norm")
"""Parts of names of parameters that weight decay leaves alone: lengths and offsets whose rest is not at 0."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """How the adapter's weights move."""

    name: str
    """transformers' name, e.g. ``paged_adamw_8bit``."""

    learning_rate: float
    """Peak step size."""

    lora_plus_ratio: float | None = None
    """LoRA+: B learns this many times faster than A, which keeps ``learning_rate``. None: both learn alike."""

    schedule: str
    """How the rate falls after warmup: ``constant``, ``linear``, ``cosine``, or ``wsd`` (it stays, then falls at the end)."""

    warmup: float | None
    """Share of the steps in which the rate rises from 0, 0 to below 1. None: one of the next two says it."""

    warmup_steps: int | None = None
    """The same, in steps."""

    warmup_tokens: int | None = None
    """The same, in tokens read; rounded up to whole steps."""

    decay: float = 0.2
    """``wsd`` only: share of the steps at the end in which the rate falls to 0 along 1 - sqrt. Source: arXiv 2405.18392:
    10 to 20 % with this form end as low as a full cosine."""

    weight_decay: float
    """Pull towards 0 on each step, decoupled as in AdamW."""

    max_grad_norm: float
    """Gradients are scaled down to this norm where they exceed it."""

    beta1: float
    """Memory of the gradient's mean."""

    beta2: float
    """Memory of the gradient's square."""

    def problems(self) -> Iterator[str]:
        if self.name not in OPTIMIZERS:
            yield f"optim.name must be one of {', '.join(OPTIMIZERS)}; got {self.name!r}"
        if self.learning_rate <= 0:
            yield f"optim.learning_rate must be positive, or nothing moves; got {self.learning_rate}"
        if self.lora_plus_ratio is not None and self.lora_plus_ratio <= 0:
            yield f"optim.lora_plus_ratio must be positive (16 is usual), or null for none; got {self.lora_plus_ratio}"
        if self.schedule not in SCHEDULES:
            yield f"optim.schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}"
        yield from self._warmup_problems()
        if not 0 < self.decay <= 1:
            yield f"optim.decay is a share of the steps, above 0 and at most 1; got {self.decay}"
        if self.schedule == "wsd" and (self.warmup or 0) + self.decay > 1:
            yield f"optim.warmup and optim.decay are shares of the same steps, together at most 1; got {self.warmup} and {self.decay}"
        if self.weight_decay < 0:
            yield f"optim.weight_decay must not be negative, or weights grow by themselves; got {self.weight_decay}"
        if self.max_grad_norm <= 0:
            yield f"optim.max_grad_norm must be positive; got {self.max_grad_norm}"
        for key, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                yield f"optim.{key} must be at least 0 and below 1; got {beta}"

    def _warmup_problems(self) -> Iterator[str]:
        forms = {"warmup": self.warmup, "warmup_steps": self.warmup_steps, "warmup_tokens": self.warmup_tokens}
        given = {key: value for key, value in forms.items() if value is not None}
        if len(given) != 1:
            found = " and ".join(f"{key}={value}" for key, value in given.items()) or "none"
            keep = next((key for key in reversed(given)), "warmup")
            others = ", ".join(f"optim.{key}=null" for key in given if key != keep) or "optim.warmup=0"
            yield f"optim.warmup, warmup_steps and warmup_tokens say the same in three forms: give exactly one; got {found}: set {others}"
        if self.warmup is not None and not 0 <= self.warmup < 1:
            yield f"optim.warmup is a share of the steps, at least 0 and below 1; got {self.warmup}"
        for key in ("warmup_steps", "warmup_tokens"):
            if forms[key] is not None and forms[key] < 0:  # type: ignore[operator]  # None is excluded just before
                yield f"optim.{key} must be 0 or more; got {forms[key]}"


def warmup_steps(config: OptimConfig, *, steps: int, tokens_per_step: float) -> int:
    """Steps in which the rate rises, whichever form the user chose; at most all of them.

    Args:
        config: The optim group.
        steps: Optimizer steps in all.
        tokens_per_step: Tokens that one step reads, on average and over all processes.
    """
    if config.warmup_steps is not None:
        wanted = config.warmup_steps
    elif config.warmup_tokens is not None:
        wanted = math.ceil(config.warmup_tokens / tokens_per_step)
    else:
        assert config.warmup is not None, "problems() has let no config without a warmup pass"
        wanted = math.ceil(steps * config.warmup)
    return min(wanted, steps)


def schedule_arguments(config: OptimConfig, *, steps: int, tokens_per_step: float) -> dict[str, Any]:
    """What transformers' TrainingArguments are told about the learning rate's course.

    Source: transformers 5.23, optimization.get_wsd_schedule; its stable phase is what warmup and decay leave.
    """
    rising = warmup_steps(config, steps=steps, tokens_per_step=tokens_per_step)
    told: dict[str, Any] = {"lr_scheduler_type": SCHEDULES[config.schedule], "warmup_steps": rising}
    if config.schedule == "wsd":
        falling = min(math.ceil(steps * config.decay), steps - rising)
        told["lr_scheduler_kwargs"] = {"num_decay_steps": falling, "decay_type": "1-sqrt"}
    return told


def parameter_groups(model: Any, config: OptimConfig) -> list[dict[str, Any]]:
    """What trains, in groups with their own rate and decay; A first, so that its rate is the one that is logged.

    Args:
        model: Its parameters that require a gradient are taken, each once.
        config: The optim group.
    """
    faster = config.learning_rate * (config.lora_plus_ratio or 1.0)
    groups: dict[str, dict[str, Any]] = {
        "a": {"params": [], "lr": config.learning_rate, "weight_decay": config.weight_decay},
        "b": {"params": [], "lr": faster, "weight_decay": config.weight_decay},
        "undecayed": {"params": [], "lr": config.learning_rate, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "b" if config.lora_plus_ratio is not None and ("lora_B" in name or "lora_embedding_B" in name) else "a"
        if any(part in name.lower() for part in UNDECAYED):
            kind = "undecayed"
        groups[kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def make_optimizer(model: Any, config: OptimConfig, arguments: Any) -> Any:
    """The optimizer that a transformers Trainer would make of its arguments, over our `parameter_groups`.

    Args:
        model: The adapted model.
        config: The optim group.
        arguments: The trainer's TrainingArguments; they name the optimizer that `place` chose, and its betas.
    """
    from transformers import Trainer

    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return kind(parameter_groups(model, config), **settings)


def state_bytes(optimizer: Any) -> int:
    """Bytes that an optimizer keeps between steps."""
    import torch

    inner = getattr(optimizer, "optimizer", optimizer)
    tensors = (value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
