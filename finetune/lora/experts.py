"""Adapters of a mixture's experts, and routers that are trained whole.

targets = expert_targets(model, "shared")  # what peft adapts besides attention
routers = router_names(model)  # what peft trains whole
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.inference.logits import unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.lora.config import LoraConfig


def expert_targets(model: nn.Module, form: str) -> dict[str, int]:
    """Counts the layers that adapt experts, by the last segment of their names; adds those that experts share.

    Args:
        model: The base.
        form: ``lora.experts``.

    Raises:
        ModelError: The model has no experts that can be adapted.
    """
    from finetune.quantization.experts import COMMON, EXPERT_LAYERS, split_modules

    mixtures = split_modules(model)
    if form == "none":
        return {}
    if not mixtures:
        raise ModelError(f"lora.experts={form}: this model has no experts in 4 bits; set lora.experts=none")
    if form == "shared":
        add_common_layers(model)
        return dict.fromkeys(COMMON.values(), len(mixtures))
    return dict.fromkeys(EXPERT_LAYERS, sum(experts.experts for experts in mixtures.values()))


def add_common_layers(model: nn.Module) -> None:
    """Adds the layers that the experts of a decoder layer share, which compute zeros until they are adapted."""
    from finetune.quantization.experts import split_modules

    for experts in split_modules(model).values():
        experts.add_common_layers()


def has_common_layers(model: nn.Module) -> bool:
    """Returns whether `add_common_layers` has changed the model."""
    from finetune.quantization.experts import COMMON, GATE, split_modules

    return any(COMMON[GATE] in dict(experts.named_children()) for experts in split_modules(model).values())


def prepare_base_for(model: nn.Module, adapter: Path) -> None:
    """Gives a base the layers that a saved adapter needs and a plain base does not have.

    Raises:
        ModelError: The adapter is one of all experts together, and the base has no experts in 4 bits.
    """
    from finetune.quantization.experts import COMMON, split_modules

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if not set(COMMON.values()) & set(config.get("target_modules") or ()):
        return
    if not split_modules(model):
        raise ModelError(f"{adapter} adapts experts in 4 bits, and this base has none; load the base as nf4 or fp4")
    add_common_layers(model)


def router_names(model: Any) -> dict[str, int]:
    """Counts the routers that the auxiliary loss of the model's class sees, by the last two segments of their names.

    Raises:
        ModelError: The class has no such loss.
    """
    kind = _router_class(model)
    if kind is None or _auxiliary_factor(model) is None:
        raise ModelError(
            f"lora.routers=true: {type(model).__name__} has no auxiliary loss that keeps its experts balanced; set "
            "lora.routers=false"
        )
    return dict(Counter(".".join(name.split(".")[-2:]) for name, m in model.named_modules() if isinstance(m, kind)))


def router_loss(model: Any, config: LoraConfig) -> float:
    """Returns the factor of the auxiliary loss, from the model's own config.json; 0 where routers are frozen."""
    return (_auxiliary_factor(model) or 0.0) if config.routers else 0.0


def _router_class(model: Any) -> type[nn.Module] | None:
    """Returns the class of the routers that the auxiliary loss sees; None where the model's class has none."""
    recorded = (getattr(model.get_decoder(), "_can_record_outputs", None) or {}).get("router_logits")
    kind: type[nn.Module] | None = getattr(recorded, "target_class", None)
    return kind


def _auxiliary_factor(model: Any) -> float | None:
    return getattr(model.config.get_text_config(), "router_aux_loss_coef", None)


def round_routers(adapted: nn.Module) -> None:
    """Makes trained routers round their float32 weights to the dtype of their input, as a merged model has them.

    Which experts a token reaches is a discrete choice: a router in another dtype than the merged one would send some
    tokens elsewhere.
    """
    from peft.utils.other import ModulesToSaveWrapper

    kind = _router_class(unwrap(adapted))
    wrappers = [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    for router in (trained for wrapper in wrappers for trained in wrapper.modules_to_save.values()):
        if kind is not None and isinstance(router, kind):
            router.forward = partial(_rounded_forward, router)


def _rounded_forward(router: Any, hidden_states: Tensor) -> Any:
    rounded = copy.copy(router)
    dtype = hidden_states.dtype
    rounded._parameters = {name: p if p is None else p.to(dtype) for name, p in router._parameters.items()}
    return type(router).forward(rounded, hidden_states)
