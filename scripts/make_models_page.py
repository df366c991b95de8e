"""Writes docs/models.md, the tables of model families and options: ``python scripts/make_models_page.py``.

A test compares the page with what this writes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune.architecture import ArchitectureConfig
from finetune.export.gguf.architecture import ARCHITECTURES
from finetune.kernels.forms import FUSED_FAMILIES
from finetune.parameters import linear_layers, parameters
from finetune.paths import CONF
from finetune.plan.model_config import UNCOUNTED

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
INTRO = """# Models

Every option of the `model` group with dimensions, written by `scripts/make_models_page.py`. `plan` computes all of
them in closed form. `tests/plan/test_classes.py` builds each option's class of transformers on the meta device and
compares parameters and linear layers by name and shape, except where `plan --exact` says no;
`tests/lora/test_classes.py` attaches LoRA to a tiny model of each of these classes.

- **LoRA** lists the linear layers that `lora.targets: [all-linear]` adapts. The head, routers, experts and gates of
  width one are not adapted. glm4_moe needs `lora.targets: [q_proj, k_proj, v_proj, o_proj]`: for the other names peft
  0.21 would adapt all experts, which is refused.
- **Image-text models** (Gemma 3 from 4B on, Gemma 4, Ministral 3, Mistral Small 3.2, Qwen3.5 and 3.6): the text decoder
  alone is loaded, so no tower takes memory, is quantized or adapted; the log names what is left out. A merge copies the
  rest of the checkpoint unchanged.
- **Experts in NF4**: transformers 5 holds experts in 3-D parameters, which bitsandbytes leaves in 16 bit. With `nf4`
  and `fp4` they are loaded as linear layers instead, one by one, equal to transformers' own class in logits and
  gradients (`tests/quantization/test_experts.py`). Experts of a class that is not covered stay in 16 bit; the
  log counts their weights. `lora.experts: each` adapts every expert with matrices of its own, `shared` all experts of a
  layer with the same ones. Both are saved in peft's files under names that this project's loader gives the experts:
  plain peft does not load them, and the merged model is a plain one.
- **Routers** are frozen. `lora.routers: true` trains them whole and adds the auxiliary load-balancing loss of the
  model's class, times the `router_aux_loss_coef` of its config.json (gpt_oss, mixtral, qwen3_5_moe_text, qwen3_moe;
  glm4_moe has none and is refused). The training loss that is logged includes it; held-out losses do not. The adapter
  holds them as peft's `modules_to_save`.
- **Gated delta nets and short convolutions** (Qwen3.5 and 3.6, LFM2) carry their state from one document of a row into
  the next in plain torch, and Granite 4's mask ignores where a document begins: preflight finds that, and documents of
  these models are not packed. `plan` counts plain torch; the kernels of `fla` would keep less.

"""
TESTED_EXPERTS = ("glm4_moe", "gpt_oss", "mixtral", "qwen3_5_moe_text", "qwen3_moe")
"""Families whose experts `tests/quantization/test_experts.py` compares with transformers' own class."""

PLAIN = {
    "falcon": "q, k and v interleaved in one layer, LayerNorm, no gate",
    "gemma4_text": "queries, keys and values shared between layers or made from one projection",
    "gemma4_unified_text": "queries, keys and values shared between layers or made from one projection",
    "glm4": "rotary positions of neighbouring columns",
    "glm4_moe": "experts",
    "gpt_neox": "q, k and v interleaved in one layer, LayerNorm, no gate",
    "gpt_oss": "experts, sinks",
    "granitemoehybrid": "one layer for both gates of another form, Mamba-2 layers",
    "lfm2": "short convolutions",
    "mixtral": "experts",
    "phi": "LayerNorm, no gate",
    "qwen3_5_moe_text": "gated delta nets, experts",
    "qwen3_5_text": "gated delta nets",
    "qwen3_moe": "experts",
}
"""Families with an option whose layers are not fused, with the reason."""

MISSING = {
    "Qwen/Qwen3.8-27B": "no source gives its vocabulary, and whether embedding and head are tied",
    "google/gemma-4-E2B-it, google/gemma-4-E4B-it": "per-layer embeddings and shared keys and values are not planned",
    "google/gemma-4-26B-A4B-it": "a dense block next to experts is not planned",
    "zai-org/GLM-4.7-Flash": "no source gives the widths of its latent attention",
    "ibm-granite/granite-4.0-h-tiny": "Mamba-2 layers are not planned",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "Mamba-2 layers are not planned",
    "meta-models/Muse-Glimmer-30B": "transformers 5.23 has no class of text alone for it",
}
"""Models that people tune and that have no option, with the reason."""

HEADS = (
    "family | class | LoRA | fused steps | experts in NF4 | GGUF | `plan --exact`",
    "option | model | family | parameters | template | experiments",
    "model | why",
)


def page() -> str:
    """Returns the whole page."""
    found = dict(options())
    families = sorted({_dimensions(option).family for option in found.values()})
    tables: tuple[tuple[str, list[Any]], ...] = (
        ("Families", [_family(family, found) for family in families]),
        ("Options", [_option(name, option) for name, option in found.items()]),
        ("Without an option", list(MISSING.items())),
    )
    return INTRO + "\n".join(_table(title, head, rows) for (title, rows), head in zip(tables, HEADS, strict=True))


def options() -> Iterator[tuple[str, Any]]:
    """Yields name and content of each model option that has dimensions."""
    for file in sorted((CONF / "model").glob("[!_]*.yaml")):
        option: Any = OmegaConf.load(file)
        if option.get("architecture"):
            yield file.stem, option


def _table(title: str, head: str, rows: list[Any]) -> str:
    lines = [head, " | ".join("---" for _ in head.split(" | ")), *(" | ".join(row) for row in rows)]
    return f"## {title}\n\n" + "".join(f"| {line} |\n" for line in lines)


def _dimensions(option: Any) -> ArchitectureConfig:
    return ArchitectureConfig(**option.architecture)


def _family(family: str, found: dict[str, Any]) -> tuple[str, ...]:
    members = [dimensions for option in found.values() if (dimensions := _dimensions(option)).family == family]
    adapted = dict.fromkeys(linear.name for member in members for linear in linear_layers(member) if linear.adapted)
    return (
        family,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family],
        ", ".join(adapted),
        "yes" if family in FUSED_FAMILIES else f"no: {PLAIN[family]}",
        _yes(family in TESTED_EXPERTS) if any(member.experts for member in members) else "has none",
        _yes(family in ARCHITECTURES),
        _yes(family not in UNCOUNTED),
    )


def _option(name: str, option: Any) -> tuple[str, ...]:
    recipes = sorted((CONF / "experiment").glob("*.yaml"))
    experiments = [file.stem for file in recipes if f"override /model: {name}\n" in file.read_text(encoding="utf-8")]
    dimensions, template = _dimensions(option), option.get("template") or "the tokenizer's"
    return name, option.name, dimensions.family, f"{parameters(dimensions):,}", template, ", ".join(experiments)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
