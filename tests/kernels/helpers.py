"""Tiny models of several families, micro-batches for them, and steps taken both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finetune import lora
from finetune.inference.collate import Collator
from finetune.kernels import Fusion, KernelsConfig, apply_fusion
from tests.fixtures.models import PLACEMENT

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 32}
"""Two key heads of one tile's width for four query heads."""

LENGTHS = (40, 1, 33, 31)

BOUNDS = {"float32": 1e-5, "bfloat16": 0.06}
"""How far the gradient of one matrix may lie from the plain one, in its own length. float32 keeps 24 bits: 1e-7 to 1e-6
was seen, so whatever the fused layers leave out shows. bfloat16 keeps 8 (0.4 % an operation, twenty deep): 0.5 to 2.5 %
was seen."""


def kernels_config(**wishes: str) -> KernelsConfig:
    """``auto`` but for the wishes; memory stays the C library's, which is set for a whole process."""
    return KernelsConfig(
        **{**dict.fromkeys(("layers", "weights", "loss", "implementation"), "auto"), "memory": "plain", **wishes}
    )


def base(family: str, *, dtype: str = "bfloat16", **settings: Any) -> Any:
    """A random model; its layers are made eight times as large, so that attention and gates are far from flat."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    attention = "eager" if family == "Gemma2" else "sdpa"  # torch's attention cannot cap scores
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.mul_(8) if parameter.dim() == 2 else parameter.normal_(std=0.5)
    return model.eval()


def adapt(model: Any, *, checkpointing: bool = False, upcast: str = "none", **changes: Any) -> Any:
    """LoRA on every linear layer, with B filled so that A learns too."""
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["all-linear"], "dtype": "float32", **changes}
    adapted = lora.attach(model, lora.LoraConfig(**settings), upcast=upcast, checkpointing=checkpointing, seed=1)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return adapted.train()


def fuse(adapted: Any, *, dtype: str = "bfloat16", checkpointing: str = "none", **wishes: str) -> Fusion:
    return apply_fusion(
        adapted, kernels_config(**wishes), placement=replace(PLACEMENT, dtype=dtype), checkpointing=checkpointing
    )


def batch(lengths: Sequence[int] = LENGTHS, *, flat: bool = True, trained: bool = True) -> dict[str, Any]:
    """Random documents of which two tokens in three are trained on, or none."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in lengths:
        ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        labels = [token if trained and number % 3 else -100 for number, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels, "seq_lengths": [length]})
    made = Collator(flat=flat, pad_token_id=0)(rows)
    del made["padding"]
    return made


def all_logits_loss(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Summed loss over all logits, as transformers' own models give them."""
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest, use_cache=False).logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits, inputs["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of the summed loss; the model has none afterwards."""
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def fused_and_plain(model: Any, fusion: Fusion, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Loss by fusion steps, by plain ones, and how far distance the gradients lie."""
    mine = fusion.loss(model, inputs)
    found = gradients(model, mine)
    with fusion.disabled():
        plain = all_logits_loss(model, inputs)
        expected = gradients(model, plain)
    return mine.detach(), plain.detach(), farthest(found, expected)


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance between two gradients of one matrix, in the length of the second."""
    assert found.keys() == expected.keys()
    assert found
    return max(share(found[name], expected[name]) for name in expected)


def share(found: Tensor, expected: Tensor) -> float:
    """Distance in the length of the second."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
