"""LoRA reaches every linear layer of the decoder of each class, and nothing else."""

import pytest

from finetune.errors import ModelError
from finetune.lora import LoraConfig, attach
from finetune.lora.adapter import match_targets
from finetune.parameters import linear_layers
from tests.fixtures.architectures import architecture
from tests.fixtures.classes import CLASSES, tiny, tiny_model

MOVED = ("glm4_moe",)


@pytest.mark.parametrize("family", sorted(set(CLASSES) - set(MOVED)))
def test_all_linear_adapts_the_decoders_linear_layers_and_nothing_else(family: str) -> None:
    from peft.tuners.lora import LoraLayer

    found = architecture(CLASSES[family])
    config = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=["all-linear"], dtype="float32")
    adapted = attach(tiny_model(found), config, upcast="none", checkpointing=False, seed=1)
    names = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    expected = {
        f"model.layers.{index}.{layer.parent}.{layer.name}"
        for layer in linear_layers(tiny(found))
        for index in layer.layers
        if layer.name not in ("shared_expert_gate", "router", "gate")
    }
    assert names == expected


@pytest.mark.parametrize("family", MOVED)
def test_names_that_peft_moves_to_the_experts_are_refused_with_those_that_it_does_not(family: str) -> None:
    model = tiny_model(architecture(CLASSES[family]))
    message = r"in place of down_proj, gate_proj, up_proj; set lora.targets=\[k_proj,o_proj,q_proj,v_proj\]"
    with pytest.raises(ModelError, match=message):
        match_targets(model, ["all-linear"])
    assert set(match_targets(model, ["q_proj", "k_proj", "v_proj", "o_proj"])) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
