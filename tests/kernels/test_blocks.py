"""Fused layers inside whole models: what they give, when they step aside, and what checkpointing changes."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.kernels import Fusion, native, plain
from tests.kernels.helpers import (
    BOUNDS,
    GROUPED,
    SIZES,
    adapt,
    all_logits_loss,
    base,
    batch,
    farthest,
    fuse,
    fused_and_plain,
    gradients,
)

LONGEST = 40
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama, a head each": ("Llama", {**SIZES, "head_dim": 16}),
    "llama, biases": ("Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral, no window": ("Mistral", {**GROUPED, "sliding_window": None}),
    "mistral, long window": ("Mistral", {**GROUPED, "sliding_window": LONGEST}),
    "mistral, short window": ("Mistral", {**GROUPED, "sliding_window": LONGEST - 1}),
    "qwen2, biases": ("Qwen2", GROUPED),
    "qwen2, one layer with a window": ("Qwen2", {**GROUPED, **QWEN_WINDOWS}),
}


def made(name: str, dtype: str, **wishes: str) -> tuple[Any, Fusion]:
    family, settings = FAMILIES[name]
    adapted = adapt(base(family, dtype=dtype, **settings))
    return adapted, fuse(adapted, dtype=dtype, **wishes)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_the_plain_ones(name: str, dtype: str, flat: bool, steps: Counter[str]) -> None:
    model, fusion = made(name, dtype)
    mine, expected, distance = fused_and_plain(model, fusion, batch(flat=flat))
    attentions, linears = (2, 2 * 2) if flat else (0, 2 * 4)  # padded: q, k, v and o alone, with their cached weights
    assert +steps == +Counter({"attention": attentions, "product": 4 + linears, "norm": 5})
    assert distance <= BOUNDS[dtype]
    torch.testing.assert_close(mine, expected, rtol=1e-6 if dtype == "float32" else 2e-3, atol=0.0)


@pytest.mark.parametrize("weights", ["cached", "quantized"])
@pytest.mark.parametrize("implementation", ["native", "plain"])
def test_every_way_to_compute_a_quantized_model_gives_the_gradient(
    tiny_base: Any, weights: str, implementation: str
) -> None:
    from tests.fixtures.models import load

    if implementation == "native" and (why := native.obstacle()):
        pytest.skip(why)
    model = adapt(load(tiny_base, "nf4", double=True))
    fusion = fuse(model, layers="fused", loss="trained", weights=weights, implementation=implementation)
    assert fusion.kernels is (native if implementation == "native" else plain)
    _, _, distance = fused_and_plain(model, fusion, batch())
    assert distance <= BOUNDS["bfloat16"]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_documents_of_one_row_do_not_read_each_other(dtype: str) -> None:
    model, fusion = made("llama", dtype)
    together = fusion.loss(model, batch((40, 33)))
    alone = batch((40, 33), flat=False)
    distance = sum(
        fusion.loss(
            model, {**{key: alone[key][row : row + 1, :length] for key in ("input_ids", "labels")}, **_borders(length)}
        )
        for row, length in enumerate((40, 33))
    )
    torch.testing.assert_close(together, distance, rtol=1e-6 if dtype == "float32" else 1e-3, atol=0.0)


def _borders(length: int) -> dict[str, Any]:
    ends = torch.tensor([0, length], dtype=torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}


def test_adapter_that_is_switched_off_gives_the_base(steps: Counter[str]) -> None:
    model, fusion = made("llama", "bfloat16")
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad(), model.disable_adapter():
        found = model(**inputs, use_cache=False).logits
        assert "product" in steps, "a preference objective's reference takes the same steps as its policy"
        with fusion.disabled():
            expected = model(**inputs, use_cache=False).logits
    adapted = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=0.0, atol=0.15 * float(expected.float().std())
    )  # bfloat16
    assert (adapted.float() - found.float()).abs().max() > 0.1 * found.float().std()


def test_off_takes_no_fused_step_and_on_comes_back(steps: Counter[str]) -> None:
    model, fusion = made("llama", "bfloat16")
    with fusion.disabled():
        all_logits_loss(model, batch())
        assert not steps
        assert fusion.autocast
        assert not fusion.loss_on_trained_tokens
    fusion.loss(model, batch())
    assert steps["attention"] == 2
    assert not fusion.autocast
    assert fusion.loss_on_trained_tokens


def test_off_gives_the_bits_of_a_model_that_was_never_fused() -> None:
    untouched = adapt(base("Llama", **GROUPED))
    expected = gradients(untouched, all_logits_loss(untouched, batch()))
    model, fusion = made("llama", "bfloat16")
    with fusion.disabled():
        found = gradients(model, all_logits_loss(model, batch()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_norm_that_learns_keeps_its_own_gradient(steps: Counter[str]) -> None:
    model, fusion = made("llama", "float32")
    norm = model.get_base_model().model.norm
    norm.weight.requires_grad_(True)
    _, _, distance = fused_and_plain(model, fusion, batch())
    assert steps["norm"] == 4
    assert distance <= BOUNDS["float32"]


def test_generation_with_a_cache_goes_the_plain_way(steps: Counter[str]) -> None:
    model, _ = made("llama", "float32")
    ids = batch((12,))["input_ids"][:, :12]
    found = model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert steps["attention"] == 0
    with torch.no_grad():
        again = model(input_ids=found[:, :-1], use_cache=False).logits[:, 11:].argmax(-1)
    assert found[0, 12:].tolist() == again[0].tolist()


def test_generation_reads_the_cached_weights_of_a_quantized_model(
    tiny_base: Any, steps: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of a few rows costs less than to dequantize the layers that compute it."""
    from bitsandbytes.nn import Linear4bit

    from tests.fixtures.models import load

    model = adapt(load(tiny_base, "nf4", double=True, dtype="float32")).eval()
    fusion = fuse(model, dtype="float32", weights="cached")
    ids, layers = batch((12,))["input_ids"][:, :12], model.config.num_hidden_layers
    with torch.no_grad(), fusion.disabled():
        expected = model(input_ids=ids).logits
    dequantized = Counter[str]()
    forward = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: dequantized.update(["layer"]) or forward(self, x))
    with torch.no_grad():
        found = model(input_ids=ids).logits
        assert not dequantized
        assert steps["product"] == 6 * layers
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - found).abs().max() > 0.01
        assert not dequantized
        with fusion.disabled():
            model(input_ids=ids)
    assert dequantized["layer"] == 7 * layers


def checkpointed(kind: str, **wishes: str) -> tuple[dict[str, Tensor], int]:
    """The gradients, and the bytes kept for the way back outside of what is computed again."""
    adapted = adapt(base("Llama", **GROUPED))
    if kind == "full":
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    fusion = fuse(adapted, checkpointing=kind, **wishes)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fusion.loss(adapted, batch()) if fusion.loss_on_trained_tokens else all_logits_loss(adapted, batch())
    return gradients(adapted, loss), sum(kept.values())


@pytest.mark.parametrize("layers", ["fused", "plain"])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(kind: str, layers: str) -> None:
    (expected, all_bytes), (found, some_bytes) = checkpointed("none", layers=layers), checkpointed(kind, layers=layers)
    assert farthest(found, expected) <= 1e-6, "the same operations on the same numbers, once more"
    assert some_bytes < 0.8 * all_bytes
