"""apply_fusion: what it fuses, what it leaves alone and why, and the loss on trained tokens."""

from typing import Any

import pytest
import torch
from torch import nn

from finetune.errors import HardwareError
from finetune.kernels import native, plain
from finetune.kernels.autograd import LOSS_ROWS, FusedLinearCrossEntropy
from finetune.kernels.linear import draw_seed, dropout_mask
from tests.fixtures.models import load
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
    share,
)

GLM = ("Glm4", GROUPED)
NEOX = ("GPTNeoX", SIZES)
COHERE = ("Cohere", {**SIZES, "num_key_value_heads": 2, "logit_scale": 0.5})


def layers_reason(choice: Any) -> str:
    return str(next(reason for reason in choice.reasons if reason.startswith("layers ")))


def replaced(model: Any) -> list[str]:
    """Modules whose forward pass is no longer their class's."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", [GLM, NEOX, COHERE], ids=lambda family: family[0])
def test_unknown_architecture_is_left_alone_and_its_loss_is_right(family: tuple[str, dict[str, Any]]) -> None:
    model = adapt(base(family[0], dtype="float32", **family[1]))
    fusion = fuse(model, dtype="float32")
    name = f"{family[0]}ForCausalLM"
    assert layers_reason(fusion.choice) == f"layers plain: {name} has no attention or gated MLP of a known class"
    assert replaced(model) == []
    assert fusion.choice.loss_on_trained_tokens
    mine, expected, distance = fused_and_plain(model, fusion, batch())
    assert distance <= BOUNDS["float32"]
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0.0)


class SeededDropout(nn.Dropout):
    """peft's dropout with the masks of the fused layers, drawn in the same order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = dropout_mask(x, rate=self.p, seed=draw_seed(self.p if self.training else 0.0))
        return x if mask is None else x * mask


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_computed_as_peft_does(checkpointing: bool) -> None:
    """Recomputed layers draw the same seeds again, since checkpointing restores torch's generator."""
    model = adapt(base("Llama", dtype="float32", **GROUPED), dropout=0.25, checkpointing=checkpointing)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fusion = fuse(model, dtype="float32")
    assert fusion.choice.fused
    for layer in (layer for layer in model.modules() if hasattr(layer, "lora_dropout")):
        layer.lora_dropout["default"] = SeededDropout(0.25)
    torch.manual_seed(11)
    mine = fusion.loss(model, batch())
    found = gradients(model, mine)
    with fusion.disabled():
        torch.manual_seed(11)
        plain_loss = all_logits_loss(model, batch())
        expected = gradients(model, plain_loss)
    torch.testing.assert_close(mine, plain_loss, rtol=1e-6, atol=0.0)
    assert farthest(found, expected) <= BOUNDS["float32"]
    torch.manual_seed(12)
    assert not torch.allclose(fusion.loss(model, batch()), mine, rtol=1e-5)
    without = [fusion.loss(model.eval(), batch()) for _ in range(2)]
    assert torch.equal(*without)


def test_a_dropout_mask_has_its_rate_and_the_mean_of_one() -> None:
    mask = dropout_mask(torch.ones(400, 500), rate=0.1, seed=5)
    assert mask is not None
    assert float((mask == 0).float().mean()) == pytest.approx(0.1, abs=0.005)  # seven standard deviations
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.005)


def test_variant_with_its_own_formula_is_left_to_peft() -> None:
    model = adapt(base("Llama", **GROUPED), variant="dora")
    assert layers_reason(fuse(model).choice) == "layers plain: only peft computes this variant of LoRA"
    assert replaced(model) == []


def test_variant_that_only_scales_is_fused(tiny_base: Any) -> None:
    model = adapt(base("Llama", dtype="float32", **GROUPED), variant="rslora")
    fusion = fuse(model, dtype="float32")
    assert fusion.choice.fused
    assert fused_and_plain(model, fusion, batch())[2] <= BOUNDS["float32"]


def test_int8_layers_compute_in_their_own_way(tiny_base: Any) -> None:
    model = adapt(load(tiny_base, "int8"))
    assert layers_reason(fuse(model).choice) == "layers plain: Linear8bitLt layers have their own kernels"
    assert replaced(model) == []


def test_int8_layer_without_adapter_among_dense_ones_is_found_too() -> None:
    """Its weight is whole numbers: taken for a dense one it would be off by its scales."""
    import bitsandbytes

    model = base("Llama", **GROUPED)
    for layer in model.model.layers:
        dense = layer.self_attn.k_proj
        layer.self_attn.k_proj = bitsandbytes.nn.Linear8bitLt(
            dense.in_features, dense.out_features, bias=False, has_fp16_weights=False
        )
        layer.self_attn.k_proj.load_state_dict(dense.state_dict())
        layer.self_attn.k_proj.to("cpu").requires_grad_(False)
    adapted = adapt(model, targets=["q_proj", "v_proj"])
    assert layers_reason(fuse(adapted).choice) == "layers plain: Linear8bitLt layers have their own kernels"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is neither SiLU nor the tanh form of GELU"),
        ({"attention_dropout": 0.1}, "it has attention dropout"),
    ],
)
def test_model_that_computes_otherwise_is_left_alone(changes: dict[str, Any], reason: str) -> None:
    model = adapt(base("Llama", **{**GROUPED, **changes}))
    assert layers_reason(fuse(model).choice) == f"layers plain: {reason}"


@pytest.mark.parametrize("upcast", ["norms", "all"])
def test_wider_norms_are_left_alone_and_a_step_can_be_taken(upcast: str, tiny_base: Any) -> None:
    """The last norm gives float32 then; the head's product must take it."""
    model = adapt(load(tiny_base, "nf4", double=True), upcast=upcast)
    fusion = fuse(model)
    assert layers_reason(fusion.choice) == "layers plain: model.upcast keeps norms in another dtype than bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fusion.autocast):
        if fusion.loss_on_trained_tokens:
            mine, expected, distance = fused_and_plain(model, fusion, batch())
            assert distance <= BOUNDS["bfloat16"]
            torch.testing.assert_close(mine, expected, rtol=2e-3, atol=0.0)
    assert fusion.autocast


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"layers": "fused"}, r"kernels\.layers=fused is not possible here: Glm4"),
        ({"weights": "cached"}, r"kernels\.weights=cached is not possible here: layers are plain"),
    ],
)
def test_wish_for_fused_layers_of_an_unknown_architecture_stops_the_run(wishes: dict[str, str], message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        fuse(adapt(base(GLM[0], **GLM[1])), **wishes)


def test_kernels_are_refused_for_other_numbers_than_bfloat16() -> None:
    with pytest.raises(
        HardwareError,
        match=r"kernels\.implementation=native is not possible here: "
        r"(they compute in bfloat16 and this run in float32|.*g\+\+)",
    ):
        fuse(adapt(base("Llama", dtype="float32", **GROUPED)), dtype="float32", implementation="native")


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("Mixtral", {**GROUPED, "num_local_experts": 2, "output_router_logits": True}, "its experts add to the loss"),
        ("FalconH1", {**GROUPED, "lm_head_multiplier": 0.5}, "it changes its logits after the head"),
    ],
)
def test_model_with_more_than_a_head_keeps_all_logits(family: str, settings: dict[str, Any], reason: str) -> None:
    choice = fuse(adapt(base(family, **settings), targets=["q_proj"])).choice
    assert not choice.loss_on_trained_tokens
    assert f"loss on all tokens: {reason}" in choice.reasons


def test_head_with_an_adapter_keeps_all_logits() -> None:
    import peft

    model = base("Llama", **GROUPED)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    )
    assert "loss on all tokens: its head is not a frozen linear layer without bias" in fuse(adapted).choice.reasons


def test_plain_speed_changes_no_forward_pass() -> None:
    model = adapt(base("Llama", **GROUPED))
    fusion = fuse(model, layers="plain", weights="quantized", loss="all", implementation="plain")
    assert replaced(model) == []
    assert fusion.autocast
    assert not fusion.loss_on_trained_tokens


def test_dense_base_takes_no_more_memory_after_it_is_fused() -> None:
    model = adapt(base("Llama", **GROUPED))

    def size() -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        return sum(storages.values())

    before = size()
    assert fuse(model).choice.cached
    assert size() == before


@pytest.mark.parametrize("rows", [1, LOSS_ROWS, LOSS_ROWS + 1, 2 * LOSS_ROWS + 7])
def test_head_loss_equals_cross_entropy_of_all_logits(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (
        torch.randn(rows, 32, generator=generator, requires_grad=True),
        torch.randn(99, 32, generator=generator),
    )
    targets = torch.randint(0, 99, (rows,), generator=generator)
    found = FusedLinearCrossEntropy.apply(hidden, weight, targets, plain)
    (mine,) = torch.autograd.grad(found / 3, hidden)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (right,) = torch.autograd.grad(expected / 3, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    assert share(mine, right) <= 1e-5


@pytest.mark.parametrize("kernels", [native, plain], ids=lambda module: module.__name__.rpartition(".")[2])
def test_head_loss_of_no_rows_is_zero(kernels: Any) -> None:
    hidden = torch.zeros(0, 32, dtype=torch.bfloat16, requires_grad=True)
    loss = FusedLinearCrossEntropy.apply(
        hidden, torch.zeros(99, 32, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.long), kernels
    )
    assert loss.item() == 0.0
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, hidden)[0].shape == (0, 32)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
def test_micro_batch_that_trains_nothing_costs_nothing(flat: bool) -> None:
    model = adapt(base("Llama", **GROUPED))
    fusion = fuse(model)
    loss = fusion.loss(model, batch(flat=flat, trained=False))
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_share_of_a_step_scales_the_gradient_without_rounding_it() -> None:
    """One micro-batch's share is 1 / (tokens of the step), which bfloat16 would round by up to 0.4 %, for all in one
    direction."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(50, 64, generator=generator).bfloat16().requires_grad_(True)
    weight, targets = (
        torch.randn(99, 64, generator=generator).bfloat16(),
        torch.randint(0, 99, (50,), generator=generator),
    )
    (whole,) = torch.autograd.grad(FusedLinearCrossEntropy.apply(hidden, weight, targets, plain), hidden)
    (part,) = torch.autograd.grad(FusedLinearCrossEntropy.apply(hidden, weight, targets, plain) / 1021, hidden)
    assert part.double().norm() / whole.double().norm() * 1021 == pytest.approx(1.0, abs=5e-4)
