"""Names of experts in checkpoints: one by one as on the hub, or in the 3-D parameters of transformers."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from finetune.quantization.expert_loading import NAMES
from finetune.quantization.experts import COMMON, EXPERT_LAYERS, FUSED, fused_experts

PATTERN = re.compile(r"layers\.(\d+)\..*\bexperts\.(?:(\d+)\.)?(\w+)(?:\.weight)?$")

OF_ONE = {**{layer: layer for layer in EXPERT_LAYERS}, **NAMES}
OF_ALL = {**{name: name for name in FUSED}, **{name: layer for layer, name in COMMON.items()}}
"""Layers by their names in the weights of one expert, and in those of all experts of a decoder layer."""


class ExpertTensor(NamedTuple):
    """Where a weight of experts belongs.

    Attributes:
        block: Number of the decoder layer.
        number: Of the expert; None for all experts of the decoder layer: in one 3-D parameter, or a common change.
        layer: One of `EXPERT_LAYERS`, or of `FUSED`.
    """

    block: int
    number: int | None
    layer: str


class ExpertForm(NamedTuple):
    """How a 3-D parameter holds its experts: with the outputs last, and with gate and up in turns."""

    transposed: bool
    interleaved: bool


def expert_tensor(name: str) -> ExpertTensor | None:
    """Returns where the weight of that name belongs; None for one that is not an expert's."""
    match = PATTERN.search(name)
    if match is None:
        return None
    block, number, last = match.groups()
    layer = (OF_ONE if number else OF_ALL).get(last)
    if layer is None:
        return None
    return ExpertTensor(int(block), int(number) if number else None, layer)


@cache
def expert_form(base: Path) -> ExpertForm:
    """Returns how the base's class holds its experts, found on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.model.text_only import config_of_text

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of_text(base) or AutoConfig.from_pretrained(base))
    experts = next(experts for _, experts in fused_experts(model))
    return ExpertForm(transposed=experts.is_transposed, interleaved=not experts.is_concatenated)
