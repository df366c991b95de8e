"""What ``lora.experts`` and ``lora.routers`` cannot do is refused by name; what they attach is what was asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.compatibility import mixture_problems
from finetune.config import load
from finetune.errors import ConfigError, ModelError
from finetune.inference.adapted import load_adapter
from finetune.lora import LoraConfig, attach
from finetune.lora.config import ROUTER_LOSSES
from finetune.lora.experts import expert_targets, round_routers, router_names
from finetune.plan.inputs import PlanInputs
from finetune.plan.weights import trainable_parameters
from tests.fixtures.architectures import architecture
from tests.fixtures.classes import CLASSES, tiny_model
from tests.fixtures.mixtures import FAMILIES, load_mixture, tiny_mixture, write_mixture

MIXTURE = ["+experiment=qwen3_30b_a3b_qlora", "lora.targets=[q_proj]"]
GLM = "model=glm45_air"
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=["q_proj"], dtype="float32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.experts=true"], "got 'True': set lora.experts=each, which is what true was"),
        (["lora.experts=false"], "got 'False': set lora.experts=none"),
        (["lora.experts=all"], "lora.experts must be one of none, each, shared; got 'all'"),
        (["lora.experts=each", "model=llama32_3b"], "lora.experts=each: meta-llama/Llama-3.2-3B"),
        (["lora.routers=true", "model=llama32_3b"], "(llama) has no experts; leave that out"),
        (["lora.routers=true", GLM], "lora.routers=true: routers of glm4_moe have no auxiliary loss"),
        (["lora.experts=each", "quantization=int8"], "lora.experts=each needs experts in 4 bits; got quantization.m"),
        (["lora.experts=shared", "quantization=none"], "lora.experts=shared needs experts in 4 bits"),
        (["lora.experts=shared", "lora=eva"], "lora.experts=shared is for lora.variant=lora and rslora; got eva"),
        (["lora.experts=each", "launch=ddp", "launch.processes=2"], "lora.experts=each leaves experts without a gradi"),
        (["lora.experts=shared", "launch=fsdp", "launch.processes=2"], "layers that launch=fsdp does not shard"),
        (
            ["lora.experts=shared", "launch=deepspeed", "launch.processes=2"],
            "layers that launch=deepspeed does not sha",
        ),
        (
            ["lora.routers=true", "launch=ddp", "launch.processes=2"],
            "got launch=ddp: choose launch=single, or lora.rou",
        ),
        (
            ["lora.routers=true", "data=preference", "train.objective=dpo"],
            "adds its loss to that of train.objective=sft",
        ),
        (["lora.routers=true", "optim.weight_decay=0.1"], "which weight decay pulls to 0 and not to those of the base"),
        (["lora.routers=true", "merge.adapters={other: 1.0}"], "merge.adapters adds up low-rank changes, and lora.rou"),
        (
            ["lora.experts=each", "export=[gguf_lora]"],
            "export.gguf_lora puts the adapter on the unquantized base, whose",
        ),
        (["lora.experts=shared", "export=[bitsandbytes]"], "linear layers that lora.experts=shared adapts; export the"),
        (["lora.routers=true", "export=[gguf_lora]"], "low-rank changes only, and lora.routers=true trains whole"),
        (["lora.routers=true", "export=[bitsandbytes]"], "low-rank changes only, and lora.routers=true trains whole"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_cannot_be_are_refused_before_anything_is_looked_up(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load([*MIXTURE, *settings])
    assert message in " ".join(str(refused.value).split())


@pytest.mark.parametrize(
    "settings",
    [["lora.experts=shared", "launch=ddp", "launch.processes=2"], ["lora.experts=shared", "lora.routers=true"]],
)
def test_what_can_be_is_composed(settings: list[str]) -> None:
    load([*MIXTURE, *settings])


def test_frozen_routers_and_no_experts_are_the_defaults() -> None:
    config = load(MIXTURE).lora
    assert (config.experts, config.routers) == ("none", False)


def test_experts_that_transformers_alone_computes_are_refused_before_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load([*MIXTURE, "lora.experts=each"])
    model = tiny_model(architecture(CLASSES["qwen3_moe"]))
    assert list(mixture_problems(model, config)) == []
    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "has_post_expert_norm", True, raising=False)
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
    (problem,) = mixture_problems(model, config)
    assert problem.startswith("lora.experts=each: experts of class Qwen3MoeExperts are computed by transformers alone")


def test_a_dense_model_without_an_option_is_refused_before_weights_are_loaded() -> None:
    config = load(MIXTURE)
    config.lora = replace(config.lora, experts="each", routers=True)
    (problem,) = mixture_problems(tiny_model(architecture(CLASSES["llama"])), config)
    assert "lora.experts=each and lora.routers=true:" in problem
    assert problem.endswith("(llama) has no experts; leave that out")


def test_a_base_without_split_experts_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lora\.experts=each: this model has no experts in 4 bits"):
        expert_targets(tiny_model(architecture(CLASSES["mixtral"])), "each")


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_trained_where_the_class_has_an_auxiliary_loss_and_nowhere_else(family: str) -> None:
    model, a = tiny_model(tiny_mixture(family)), tiny_mixture(family)
    if family in ROUTER_LOSSES:
        name = "mlp.router" if family == "gpt_oss" else "mlp.gate"
        assert router_names(model) == {name: a.layers - a.dense_layers}
    else:
        with pytest.raises(ModelError, match="has no auxiliary loss that keeps its experts balanced"):
            router_names(model)


@pytest.mark.parametrize(
    ("family", "experts"), [("qwen3_5_moe_text", "shared"), ("gpt_oss", "each"), ("gpt_oss", "shared")]
)
def test_the_plan_counts_the_adapter_that_is_attached(
    family: str, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    write_mixture(tmp_path / "base", family)
    config = replace(LORA, experts=experts, routers=True)
    adapted = attach(load_mixture(tmp_path / "base"), config, upcast="none", checkpointing=False, seed=1)
    inputs = PlanInputs(
        architecture=tiny_mixture(family), method="nf4", rank=2, targets=("q_proj",), experts=experts, routers=True,
        rows=1, tokens=8, checkpointing=False,
    )  # fmt: skip
    assert trainable_parameters(inputs) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_a_common_adapter_changes_every_expert_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    write_mixture(tmp_path / "base", "mixtral")
    adapted = attach(
        load_mixture(tmp_path / "base"), replace(LORA, experts="shared"), upcast="none", checkpointing=False, seed=1
    )
    experts = adapted.get_base_model().model.layers[0].mlp.experts
    x = torch.randn(3, 64)
    before = experts(x, torch.tensor([[0], [1], [2]]), torch.ones(3, 1))
    for layer in (experts.common_gate, experts.common_up, experts.common_down):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    after = experts(x, torch.tensor([[0], [1], [2]]), torch.ones(3, 1))
    assert all(not torch.equal(row, changed) for row, changed in zip(before, after, strict=True))
    one = experts(x[1:2], torch.tensor([[1]]), torch.ones(1, 1))
    assert torch.allclose(one[0], after[1], atol=1e-5)
    with adapted.disable_adapter():
        assert torch.equal(experts(x, torch.tensor([[0], [1], [2]]), torch.ones(3, 1)), before)


def test_a_common_adapter_on_a_base_in_16_bit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    dense: Any = write_mixture(tmp_path / "base", "mixtral")
    config = replace(LORA, experts="shared")
    attach(load_mixture(tmp_path / "base"), config, upcast="none", checkpointing=False, seed=1).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(ModelError, match="adapts experts in 4 bits, and this base has none"):
        load_adapter(dense, tmp_path / "adapter", upcast="none")


def test_a_trained_router_computes_with_weights_rounded_to_its_input() -> None:
    from peft.utils.other import ModulesToSaveWrapper

    model = tiny_model(tiny_mixture("qwen3_moe")).to(torch.bfloat16)
    mixture, head = model.model.layers[0].mlp, model.lm_head
    router = mixture.gate
    torch.nn.init.normal_(router.weight)
    mixture.gate = wrapper = ModulesToSaveWrapper(router, "default")
    model.lm_head = ModulesToSaveWrapper(head, "default")
    trained = wrapper.modules_to_save["default"]
    trained.weight.data = trained.weight.data.float() + 1e-6
    round_routers(model)
    assert "forward" not in vars(model.lm_head.modules_to_save["default"]), "other trained modules stay as they are"
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    logits, scores, chosen = wrapper(x)
    assert logits.dtype == scores.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip((logits, scores, chosen), router(x), strict=True))
    logits.float().sum().backward()
    assert trained.weight.grad is not None
    assert trained.weight.grad.dtype == torch.float32
