"""Each family that is fused equals transformers' own layers: loss, gradients of the adapter, packed documents."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.kernels import Fusion, attention, forms
from finetune.kernels.fusion import fusion_obstacle
from tests.fixtures.models import PLACEMENT, model_spec, quantization_config
from tests.kernels.helpers import BOUNDS, GROUPED, SIZES, adapt, base, batch, fuse, fused_and_plain

WINDOW = 16
ALTERNATING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
}
CAPPED = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
LLAMA_4_SCALE = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "llama_4_scaling_beta": 0.2,
    "original_max_position_embeddings": 8,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {**ALTERNATING, **CAPPED}),
    "gemma3_text": ("Gemma3Text", {**ALTERNATING, "query_pre_attn_scalar": 20}),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 5.0},
    ),
    "llama": ("Llama", {}),
    "ministral": ("Ministral", ALTERNATING),
    "ministral3": ("Ministral3", {"sliding_window": None, "rope_parameters": LLAMA_4_SCALE}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", ALTERNATING),
    "phi3": ("Phi3", {"sliding_window": WINDOW, "partial_rotary_factor": 0.75}),
    "qwen2": ("Qwen2", {**ALTERNATING, "use_sliding_window": True}),
    "qwen3": ("Qwen3", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
}
"""``model_type``: configuration class, and settings under which what is particular to the family shows."""

NORMS_OF_A_LAYER = {"gemma2": 4, "gemma3_text": 6, "olmo2": 4, "olmo3": 4, "qwen3": 4}
"""Norms of queries and keys among them; two elsewhere."""


def random_base(family: str, *, dtype: str, **changes: Any) -> Any:
    """A model with random norms too, so that an offset shows, and logits of some nats."""
    name, settings = FAMILIES[family]
    made = base(name, dtype=dtype, **{**GROUPED, **settings, "tie_word_embeddings": False, **changes})
    made.lm_head.weight.mul_(20)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def quantized(family: str, folder: Path, *, dtype: str) -> Any:
    random_base(family, dtype=dtype).save_pretrained(folder)
    placement = dataclasses.replace(PLACEMENT, dtype=dtype, attention="eager" if family == "gemma2" else "sdpa")
    return model_spec(folder, quantization_config("nf4"), placement=placement).load()


def evaluate(model: Any, fusion: Fusion) -> None:
    """Computes held-out losses as training does between two steps."""
    model.eval()
    with torch.no_grad():
        fusion.loss(model, batch((20, 12)))
        model(input_ids=batch((20,))["input_ids"], use_cache=False)
    model.train()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_equal_transformers_own_before_and_after_an_evaluation(
    family: str,
    dtype: str,
    tmp_path: Path,
    steps: Counter[str],
) -> None:
    model = adapt(quantized(family, tmp_path, dtype=dtype))
    fusion = fuse(model, dtype=dtype)
    assert fusion.choice.fused, fusion.choice.reasons
    assert fusion.choice.loss_on_trained_tokens, fusion.choice.reasons
    for _ in range(2):
        steps.clear()
        mine, expected, distance = fused_and_plain(model, fusion, batch())
        norms = 2 * NORMS_OF_A_LAYER.get(family, 2) + 1
        assert +steps == +Counter({"attention": 2, "product": 8, "norm": norms})
        assert distance <= BOUNDS[dtype]
        torch.testing.assert_close(mine, expected, rtol=1e-5 if dtype == "float32" else 2e-3, atol=0.0)
        evaluate(model, fusion)


def test_every_class_and_family_of_the_list_is_here() -> None:
    assert set(FAMILIES) == set(forms.FUSED_FAMILIES)
    assert {f"{name.removesuffix('Text')}Attention" for name, _ in FAMILIES.values()} == set(forms.ATTENTIONS)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {"attn_logit_softcapping": 1.0}),
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("gemma2", {"sliding_window": 64}),
        ("granite", {"logits_scaling": 1.0}),
        ("granite", {"attention_multiplier": 3.0}),
        ("ministral3", {"rope_parameters": {**LLAMA_4_SCALE, "llama_4_scaling_beta": 0.0}}),
        ("phi3", {"partial_rotary_factor": 1.0}),
        ("smollm3", {"no_rope_layers": [1, 1]}),
    ],
    ids=str,
)
def test_what_is_particular_to_a_family_changes_the_loss(family: str, settings: dict[str, Any]) -> None:
    """What the comparison above would miss: a setting that neither side applied."""
    losses = []
    for changes in ({}, settings):
        model = adapt(random_base(family, dtype="float32", **changes))
        losses.append(float(fuse(model, dtype="float32").loss(model, batch()).detach()))
    assert abs(losses[1] / losses[0] - 1) > 1e-4


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", 2), ("qwen3", 2), ("ministral3", 2), ("gemma3_text", 1), ("smollm3", 1), ("olmo3", 0)],
)
def test_tiles_get_queries_and_keys_as_the_family_makes_them(
    family: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in computes what the AMX kernels do with what they are given, on any processor.

    They compute neither windows, nor layers without positions, nor OLMo's positions in float32.
    """
    given = Counter[str]()

    def plain_tiles(qkv: Any, cosine: Any, sine: Any, starts: Any, shape: attention.AttentionShape) -> Any:
        given["calls"] += 1
        documents = attention.Documents(starts, int(starts.diff().max()))
        bare = attention.AttentionShape(shape.heads, shape.key_heads, shape.width, shape.scale)
        return attention.attend(qkv, (cosine, sine), documents=documents, shape=bare, tiles=False)

    monkeypatch.setattr(attention._AmxAttention, "apply", plain_tiles)
    model = adapt(random_base(family, dtype="bfloat16"))
    fusion = fuse(model)
    fusion.choice = dataclasses.replace(fusion.choice, tiles=True)
    from finetune.kernels.fusion import fuse as fuse_layers
    from finetune.kernels.linear import FusedLinears

    fuse_layers(
        model.get_base_model(),
        fusion,
        fuse_linears=lambda layers: FusedLinears.of(layers, cache=False, dtype=torch.bfloat16),
    )
    mine, expected, distance = fused_and_plain(model, fusion, batch())
    assert given["calls"] == layers
    assert distance <= BOUNDS["bfloat16"]
    torch.testing.assert_close(mine, expected, rtol=2e-3, atol=0.0)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("Llama", {"hidden_act": "gelu"}, "its activation is neither SiLU nor the tanh form of GELU"),
        ("Gemma3Text", {"use_bidirectional_attention": True}, "its tokens see those after them"),
        ("GPTNeoX", {}, "GPTNeoXForCausalLM has no attention or gated MLP of a known class"),
        ("Glm4", {}, "Glm4ForCausalLM has no attention or gated MLP of a known class"),
    ],
)
def test_what_computes_otherwise_is_left_alone(family: str, settings: dict[str, Any], reason: str) -> None:
    sizes = SIZES if family == "GPTNeoX" else GROUPED
    assert fusion_obstacle(base(family, **{**sizes, **settings}), "bfloat16") == reason


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {}, forms.HeadForm()),
        ("granite", {"logits_scaling": 8.0}, forms.HeadForm(factor=1 / 8)),
        ("cohere", {"logit_scale": 0.25}, forms.HeadForm(factor=0.25)),
        ("gemma2", {"final_logit_softcapping": 30.0}, forms.HeadForm(softcap=30.0)),
        ("hyperclovax", {"logits_scaling": 8.0}, None),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, None),
    ],
)
def test_a_head_is_read_only_where_its_family_is_known(
    model_type: str, settings: dict[str, Any], expected: forms.HeadForm | None
) -> None:
    from types import SimpleNamespace

    assert forms.head_form(SimpleNamespace(model_type=model_type, **settings)) == expected


def test_the_documented_table_has_the_fused_families() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8").splitlines()
    fused = [line.split("`")[1] for line in lines if line.split("|")[2:3] == [" fused "]]
    assert fused == list(forms.FUSED_FAMILIES)
