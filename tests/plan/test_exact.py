"""The closed form against counts on transformers' own classes, bitsandbytes' own shapes and peft's own layers."""

import pytest

from finetune.config import load
from finetune.errors import ModelError
from finetune.hardware import probe
from finetune.plan.exact import compare, state_bytes
from finetune.plan.settings import from_config
from finetune.plan.step import StepSettings, with_step
from tests.fixtures.architectures import COUNTS, architecture

SHIPPED = [
    ["+experiment=quickstart"],
    ["+experiment=dpo_quick"],
    ["+experiment=llama7b_qlora", "hardware=rtx4090"],
    ["+experiment=guanaco_7b", "hardware=rtx4090"],
    ["+experiment=mistral7b_qlora", "hardware=rtx4090"],
    ["+experiment=qwen25_7b_qlora", "hardware=rtx4090"],
    ["+experiment=gemma2_9b_qlora", "hardware=a100_80gb"],
    ["+experiment=phi3_mini_qlora", "hardware=rtx3090"],
    ["+experiment=qwen3_4b_instruct_qlora", "hardware=rtx4090"],
    ["+experiment=qwen3_8b_qlora", "hardware=rtx4090"],
    ["+experiment=qwen35_9b_qlora", "hardware=rtx4090"],
    ["+experiment=llama31_8b_instruct_qlora", "hardware=rtx4090"],
    ["+experiment=gemma3_12b_qlora", "hardware=rtx4090"],
    ["+experiment=gemma4_12b_qlora", "hardware=rtx4090"],
    ["+experiment=ministral3_8b_qlora", "hardware=rtx4090"],
    ["+experiment=phi4_qlora", "hardware=rtx4090"],
    ["+experiment=smollm3_3b_qlora", "hardware=rtx3060_12gb"],
]
OTHERS = [
    ["+experiment=llama7b_qlora", "hardware=rtx4090", "train.checkpointing=none"],
    ["+experiment=llama7b_qlora", "hardware=rtx4090", "train.checkpointing=selective", "lora.dropout=0"],
    ["+experiment=qwen25_7b_qlora", "hardware=rtx4090", "lora.dropout=0"],
    ["+experiment=phi3_mini_qlora", "hardware=t4", "train.checkpointing=none"],
    ["+experiment=quickstart", "quantization=int8", "train.checkpointing=full"],
    ["+experiment=quickstart", "quantization=none", "kernels=plain"],
    ["+experiment=llama7b_qlora", "hardware=a100_80gb", "model=mixtral_8x7b"],
    ["+experiment=qwen3_30b_a3b_qlora", "hardware=rtx4090", "lora.experts=each", "train.micro_batch=1"],
    ["+experiment=qwen3_30b_a3b_qlora", "hardware=rtx4090", "lora.experts=shared", "lora.routers=true"],
]
FEW_LAYERS = "model.architecture.layers=3"
"""Layers are alike, so three show what thirty do, in a tenth of the time."""


def differences(overrides: list[str]) -> dict[str, float]:
    config = load([*overrides, FEW_LAYERS])
    machine = probe(config.hardware)
    if "micro_batch" in config.train.automatic:  # three layers would be given more rows than a test has time for
        chosen = "full" if "checkpointing" in config.train.automatic else config.train.checkpointing
        config = with_step(config, StepSettings(micro_batch=2, checkpointing=chosen))
    return {name: term.difference for name, term in compare(config, from_config(config, machine), machine).items()}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", SHIPPED + OTHERS, ids=" ".join)
def test_closed_form_and_count_agree_within_a_twentieth(overrides: list[str]) -> None:
    found = differences(overrides)
    assert abs(found["together"]) < 0.05
    assert all(
        abs(found.get(term, 0.0)) < 0.001
        for term in ("weights", "constants", "unquantized", "adapter", "optimizer", "cached")
    )
    assert abs(found["kept activations"]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral_8x7b", "qwen3_30b_a3b"])
def test_bitsandbytes_gets_every_expert_but_no_router(name: str) -> None:
    from finetune.parameters import expert_layers
    from finetune.plan.fake import build_model

    config = load(["+experiment=llama7b_qlora", f"model={name}", "model.architecture.layers=2"])
    inputs = from_config(config, probe(config.hardware))
    model, quantized = build_model(config, inputs, dtype="bfloat16")
    experts = [model.get_submodule(layer) for layer in quantized if ".experts." in layer]
    a = inputs.architecture
    assert len(experts) == a.layers * a.experts * 3
    planned = {(layer.in_features, layer.out_features) for layer in expert_layers(a)}
    assert {(layer.in_features, layer.out_features) for layer in experts} == planned
    assert not any(layer.endswith(".gate") for layer in quantized)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, *_ in COUNTS])
def test_every_family_is_built_with_as_many_weights_as_its_dimensions_say(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.plan.model_config import transformers_config

    config = load(["+experiment=llama7b_qlora", f"model={name}"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(config, architecture(name)))
    assert sum(p.numel() for p in model.parameters()) == next(total for known, total, *_ in COUNTS if known == name)


@pytest.mark.parametrize(
    ("elements", "optimizer", "size"),
    [
        (8192, "paged_adamw_8bit", 2 * (8192 + 4 * 32)),
        (4095, "adamw_8bit", 8 * 4095),
        (8192, "lion_32bit", 4 * 8192),
        (10, "adamw_torch", 80),
    ],
)
def test_states_of_one_tensor(elements: int, optimizer: str, size: int) -> None:
    assert state_bytes(elements, 4, optimizer) == size


def test_what_needs_the_weights_contents_is_not_counted() -> None:
    config = load(["+experiment=quickstart", "lora=dora"])
    machine = probe(config.hardware)
    inputs = from_config(config, machine)
    assert inputs.kernels.fused is False
    with pytest.raises(ModelError, match="dora is initialised with the norms"):
        compare(config, inputs, machine)


def test_a_family_that_cannot_be_counted_is_named() -> None:
    config = load(["+experiment=llama7b_qlora", "model=falcon_7b"])
    machine = probe(config.hardware)
    with pytest.raises(ModelError, match="falcon models are planned in closed form only"):
        compare(config, from_config(config, machine), machine)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["+experiment=quickstart"],
        ["+experiment=quickstart", "lora.dropout=0.1"],
        ["+experiment=quickstart", "quantization=none"],
        ["+experiment=quickstart", "quantization=int8"],
        ["+experiment=quickstart", "model.upcast=norms"],
        ["+experiment=quickstart", "kernels=plain"],
        ["+experiment=qwen25_7b_qlora"],
        ["+experiment=gemma2_9b_qlora"],
        ["+experiment=quickstart", "model=qwen3_06b"],
    ],
    ids=" ".join,
)
def test_the_plan_knows_how_steps_will_be_computed(overrides: list[str]) -> None:
    """`plan` foresees without torch what `speed` chooses when it sees the model."""
    from finetune.hardware import place
    from finetune.kernels.choose import choose
    from finetune.kernels.fusion import gather_facts
    from finetune.plan.fake import build_model

    config = load([*overrides, "model.architecture.layers=1", "hardware.device=cpu"])
    machine = probe(config.hardware)
    placement = place(machine, config)
    inputs = from_config(config, machine)
    model, _ = build_model(config, inputs, dtype=placement.dtype)
    choice = choose(config.kernels, gather_facts(model, placement, config.kernels), device="cpu")
    cached = choice.cached and config.quantization.method != "none"
    assert (inputs.kernels.fused, inputs.kernels.loss_on_trained_tokens, inputs.kernels.cached) == (
        choice.fused,
        choice.loss_on_trained_tokens,
        cached,
    )
