"""Packed documents without a mask of tokens by tokens: as transformers computes them with one, in every family."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from finetune.kernels import documents
from finetune.kernels.attention import Documents
from finetune.kernels.documents import ATTENTIONS, attending_by, documents_obstacle, use_documents, varlen_obstacle
from finetune.kernels.forms import DOCUMENT_FAMILIES
from tests.kernels.helpers import BOUNDS, GROUPED, SIZES, adapt, base, batch, fuse, fused_and_plain
from tests.kernels.varlen import fake_varlen_attn

WINDOW = 16
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Cohere": {},
    "Gemma3Text": {**ALTERNATING, "query_pre_attn_scalar": 20},
    "Glm4": {},
    "Gemma": {},
    "Granite": {"attention_multiplier": 0.3},
    "Llama": {},
    "Ministral": ALTERNATING,
    "Ministral3": {"sliding_window": None},
    "Mistral": {"sliding_window": WINDOW},
    "Mixtral": {"num_local_experts": 2, "sliding_window": WINDOW},
    "Olmo2": {},
    "Olmo3": ALTERNATING,
    "Phi3": {"sliding_window": WINDOW},
    "Qwen2": {**ALTERNATING, "use_sliding_window": True},
    "Qwen3": {},
    "Qwen3Moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "SmolLM3": {"no_rope_layers": [1, 0]},
}
"""A model of each class in ATTENTIONS; a window is shorter than most documents."""


@pytest.fixture(params=["split", "varlen"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen_attn)
    return bool(request.param == "varlen")


def hidden_and_gradient(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The last hidden states of packed documents, and the gradient that their embeddings get from them."""
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_(True)
    rest = {name: value for name, value in inputs.items() if name not in ("labels", "input_ids")}
    hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False, **rest).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7))
    (hidden * weights).sum().backward()
    assert embedded.grad is not None
    return hidden.detach(), embedded.grad


@contextmanager
def without_masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(**_: Any) -> None:
        raise AssertionError("a mask of tokens by tokens was made")

    with monkeypatch.context() as patched:
        patched.setattr(documents, "sdpa_mask", refuse)
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_computed_as_with_a_mask(family: str, form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = base(family, dtype="float32", **{**GROUPED, **FAMILIES[family]}), batch()
    expected, expected_gradient = hidden_and_gradient(model, inputs)
    assert documents_obstacle(model) is None
    use_documents(model)
    packed = Documents(inputs["cu_seq_lens_q"], inputs["max_length_q"], varlen=form)
    with attending_by(packed), without_masks(monkeypatch):
        found, gradient = hidden_and_gradient(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-3 * float(expected_gradient.abs().max()))


def test_every_class_of_the_list_has_a_family_here() -> None:
    import transformers

    found = {getattr(transformers, f"{family}Config").model_type for family in FAMILIES}
    assert found == set(DOCUMENT_FAMILIES)
    tested = {f"{family.removesuffix('Text')}Attention" for family in FAMILIES}
    assert tested == set(ATTENTIONS)


def test_the_window_counts(form: bool) -> None:
    """What the comparison above would miss: a window that neither side applied."""
    model, inputs = base("Mistral", dtype="float32", **GROUPED, sliding_window=WINDOW), batch()
    use_documents(model)
    found = []
    for window in (WINDOW, None):
        model.config.sliding_window = window
        with attending_by(Documents(inputs["cu_seq_lens_q"], inputs["max_length_q"], varlen=form)):
            found.append(hidden_and_gradient(model, inputs)[0])
    assert not torch.allclose(*found, atol=1e-2)


def test_rows_with_padding_are_computed_by_sdpa_to_the_bit() -> None:
    model, inputs = base("Qwen3", **GROUPED), batch(flat=False)
    expected = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    use_documents(model)
    assert torch.equal(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, expected)


def test_the_fake_has_the_signature_of_torch() -> None:
    real, fake = (inspect.signature(function).parameters for function in (varlen.varlen_attn, fake_varlen_attn))
    assert [(name, entry.kind, entry.default) for name, entry in fake.items()] == [
        (name, entry.kind, entry.default) for name, entry in real.items()
    ]


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_recomputed_layers_have_the_documents_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(base(family, dtype="float32", **GROUPED), checkpointing=True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    fusion = fuse(model, dtype="float32")
    assert fusion.choice.documents
    mine, expected, distance = fused_and_plain(model, fusion, batch())
    assert distance <= BOUNDS["float32"]
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("GPTNeoX", SIZES, "GPTNeoXAttention may need more than a window and a scale"),
        ("Llama", {**GROUPED, "attention_dropout": 0.1}, "it has attention dropout"),
    ],
)
def test_what_may_need_more_keeps_its_mask(family: str, settings: dict[str, Any], reason: str) -> None:
    assert documents_obstacle(base(family, **settings)) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"device": "cpu", "capability": None}, "is for CUDA, and this run is on cpu"),
        ({"capability": (7, 5)}, "needs compute capability 8.0; this GPU has 7.5"),
        ({"dtype": "float32"}, "computes in 16 bit, and this run in float32"),
        ({"widths": {64, 512}}, "has no kernel for heads of width 512"),
        ({"widths": {20}}, "has no kernel for heads of width 20"),
    ],
)
def test_varlen_attention_is_taken_where_torch_has_it(changes: dict[str, Any], reason: str | None) -> None:
    facts: dict[str, Any] = {"device": "cuda", "capability": (8, 0), "dtype": "bfloat16", "widths": {64, 128}}
    found = varlen_obstacle(**{**facts, **changes})
    assert found is None if reason is None else (found or "").endswith(reason)


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
"""How a program waits for a device; a boolean index, once a micro-batch, is not among them."""


def reads_of_a_step(layers: int, monkeypatch: pytest.MonkeyPatch, *, varlen_form: bool) -> list[str]:
    model = adapt(base("Llama", dtype="float32", **{**GROUPED, "num_hidden_layers": layers}))
    fusion = fuse(model, dtype="float32")
    inputs, counted = batch(), list[str]()
    if varlen_form:
        from dataclasses import replace

        fusion.choice = replace(fusion.choice, varlen=True)
    with monkeypatch.context() as patched:
        for name in READS:
            original = getattr(Tensor, name)

            def counting(self: Tensor, *arguments: Any, original: Any = original, name: str = name) -> Any:
                counted.append(name)
                return original(self, *arguments)

            patched.setattr(Tensor, name, counting)
        patched.setattr(varlen, "varlen_attn", lambda q, k, v, *_, **__: q * v.repeat_interleave(2, 1) + k.sum())
        fusion.loss(model, inputs).backward()
    return counted


def test_what_a_step_reads_from_the_device_does_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    one, four = (reads_of_a_step(layers, monkeypatch, varlen_form=False) for layers in (1, 4))
    assert one == four
    assert one.count("tolist") == 1


def test_with_varlen_attention_a_step_does_not_read_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tolist" not in reads_of_a_step(2, monkeypatch, varlen_form=True)
