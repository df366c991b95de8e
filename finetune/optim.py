"""Optimizer and learning rate schedule: the settings, and the optimizer that replaces a paged one on a device without
paging."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.errors import TrainError

UNPAGED = {
    "paged_adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "adamw_torch",
    "paged_lion_8bit": "lion_8bit",
    "paged_lion_32bit": "lion_32bit",
}
"""The same optimizers with their states in ordinary memory."""

OPTIMIZERS = (*UNPAGED, *UNPAGED.values())
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine", "wsd": "warmup_stable_decay"}
"""transformers' names by ours; with a warmup of 0, ``constant_with_warmup`` is constant."""

UNDECAYED = ("lora_magnitude_vector", "bias", "norm")
"""Parts of the names of parameters without weight decay: magnitudes and biases, whose neutral value is not 0."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Selects the optimizer and its learning rate schedule."""

    name: str
    """transformers' name, for example ``paged_adamw_8bit``."""

    learning_rate: float
    """Peak learning rate."""

    lora_plus_ratio: float | None = None
    """LoRA+: learning rate of B over that of A, which keeps ``learning_rate``. None gives both the same."""

    schedule: str
    """Decay of the rate after warmup: ``constant``, ``linear``, ``cosine``, or ``wsd`` (constant, then a decay at the
    end)."""

    warmup: float | None
    """Share of the steps in which the rate rises towards its peak; from 0 to below 1, and never all steps. None where
    one of the next two is set."""

    warmup_steps: int | None = None
    """Warmup in steps."""

    warmup_tokens: int | None = None
    """Warmup in tokens read; rounded up to whole steps."""

    decay: float = 0.2
    """``wsd`` only: share of the steps at the end in which the rate falls to 0 along 1 - sqrt. With 10 to 20 %, the
    loss ends as low as with a full cosine. Source: arXiv 2405.18392."""

    weight_decay: float
    """Weight decay on each step, decoupled as in AdamW."""

    max_grad_norm: float
    """Gradients with a larger norm are scaled down to this norm."""

    beta1: float
    """Decay of the running mean of the gradient."""

    beta2: float
    """Decay of the running mean of the squared gradient."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        if self.schedule != "wsd":
            yield "decay", f"optim.schedule={self.schedule} has no decay phase of its own"
        if self.warmup_steps is not None:
            reason = f"optim.warmup_steps={self.warmup_steps} is set"
            yield from ((name, reason) for name in ("warmup", "warmup_tokens"))
        elif self.warmup_tokens is not None:
            yield "warmup", f"optim.warmup_tokens={self.warmup_tokens} is set"

    def problems(self) -> Iterator[str]:
        """Yields one sentence for each invalid setting."""
        if self.name not in OPTIMIZERS:
            yield f"optim.name must be one of {', '.join(OPTIMIZERS)}; got {self.name!r}"
        if self.learning_rate <= 0:
            yield f"optim.learning_rate must be positive, or nothing trains; got {self.learning_rate}"
        if self.lora_plus_ratio is not None and self.lora_plus_ratio <= 0:
            yield f"optim.lora_plus_ratio must be positive (16 is usual), or null for none; got {self.lora_plus_ratio}"
        if self.schedule not in SCHEDULES:
            yield f"optim.schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}"
        yield from self._warmup_problems()
        if not 0 < self.decay <= 1:
            yield f"optim.decay is a share of the steps, above 0 and at most 1; got {self.decay}"
        if self.schedule == "wsd" and (self.warmup or 0) + self.decay > 1:
            shares = f"got {self.warmup} and {self.decay}"
            yield f"optim.warmup and optim.decay are shares of the same steps, together at most 1; {shares}"
        if self.weight_decay < 0:
            yield f"optim.weight_decay must not be negative, or weights grow without gradients; got {self.weight_decay}"
        if self.max_grad_norm <= 0:
            yield f"optim.max_grad_norm must be positive; got {self.max_grad_norm}"
        for key, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                yield f"optim.{key} must be at least 0 and below 1; got {beta}"

    def _warmup_problems(self) -> Iterator[str]:
        forms = {"warmup": self.warmup, "warmup_steps": self.warmup_steps, "warmup_tokens": self.warmup_tokens}
        values = {key: value for key, value in forms.items() if value is not None}
        if len(values) != 1:
            got = " and ".join(f"{key}={value}" for key, value in values.items()) or "none"
            last = next((key for key in reversed(values)), "warmup")
            remedy = ", ".join(f"optim.{key}=null" for key in values if key != last) or "optim.warmup=0"
            names = "optim.warmup, warmup_steps and warmup_tokens"
            yield f"{names} are three forms of one setting: give exactly one; got {got}: set {remedy}"
        if self.warmup is not None and not 0 <= self.warmup < 1:
            yield f"optim.warmup is a share of the steps, at least 0 and below 1; got {self.warmup}"
        for key in ("warmup_steps", "warmup_tokens"):
            if forms[key] is not None and forms[key] < 0:  # type: ignore[operator]  # None is excluded just before
                yield f"optim.{key} must be 0 or more; got {forms[key]}"


def warmup_steps(config: OptimConfig, *, steps: int, tokens_per_step: float) -> int:
    """Returns the number of steps in which the rate rises, from whichever form is set; fewer than all steps.

    Args:
        config: The optim group.
        steps: Total optimizer steps.
        tokens_per_step: Tokens that one step reads, on average and over all processes.

    Raises:
        TrainError: The run would end before the rate has reached its peak.
    """
    if config.warmup is not None:
        return min(math.ceil(steps * config.warmup), steps - 1)
    if config.warmup_steps is not None:
        rising, setting = config.warmup_steps, f"warmup_steps={config.warmup_steps}"
    else:
        assert config.warmup_tokens is not None, "problems() rejects a config without a warmup"
        rising, setting = math.ceil(config.warmup_tokens / tokens_per_step), f"warmup_tokens={config.warmup_tokens}"
    if rising >= steps:
        raise TrainError(
            f"optim.{setting} are {rising} steps, and the run has {steps}: the learning rate would never reach "
            "optim.learning_rate; lower it, or train for more steps"
        )
    return rising


def start_above_zero(scheduler: Any, *, rising: int) -> None:
    """Lets the rate rise from ``peak / (rising + 1)``, where transformers starts at 0 and its first step does nothing.

    Args:
        scheduler: A new ``LambdaLR`` of transformers.
        rising: Steps of warmup.
    """
    if not rising:
        return

    def risen(share: Any) -> Any:
        return lambda step: (step + 1) / (rising + 1) if step < rising else share(step)

    scheduler.lr_lambdas = [risen(share) for share in scheduler.lr_lambdas]
    rates = [
        base * share(scheduler.last_epoch) for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def schedule_arguments(config: OptimConfig, *, steps: int, tokens_per_step: float) -> dict[str, Any]:
    """Returns the learning rate schedule as keyword arguments of transformers' TrainingArguments.

    Source: transformers 5.23, optimization.get_wsd_schedule; its stable phase is what warmup and decay leave.
    """
    rising = warmup_steps(config, steps=steps, tokens_per_step=tokens_per_step)
    arguments: dict[str, Any] = {"lr_scheduler_type": SCHEDULES[config.schedule], "warmup_steps": rising}
    if config.schedule == "wsd":
        falling = min(math.ceil(steps * config.decay), steps - rising)
        arguments["lr_scheduler_kwargs"] = {"num_decay_steps": falling, "decay_type": "1-sqrt"}
    return arguments


def parameter_groups(model: Any, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups trained parameters by learning rate and weight decay; A comes first, so that its rate is logged.

    Args:
        model: Every parameter that requires a gradient is in one group.
        config: The optim group.
    """
    rate_of_b = config.learning_rate * (config.lora_plus_ratio or 1.0)
    groups: dict[str, dict[str, Any]] = {
        "a": {"params": [], "lr": config.learning_rate, "weight_decay": config.weight_decay},
        "b": {"params": [], "lr": rate_of_b, "weight_decay": config.weight_decay},
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
    """Builds the optimizer that a transformers Trainer would build from its arguments, with our `parameter_groups`.

    Args:
        model: The adapted model.
        config: The optim group.
        arguments: The trainer's TrainingArguments; they name the optimizer that `place` chose, and its betas.
    """
    from transformers import Trainer

    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return kind(parameter_groups(model, config), **settings)


def state_bytes(optimizer: Any) -> int:
    """Counts the bytes that an optimizer keeps between steps."""
    import torch

    inner = getattr(optimizer, "optimizer", optimizer)
    tensors = (value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
