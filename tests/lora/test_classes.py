"""LoRA reaches every linear layer of the decoder of each class, and nothing else."""

import pytest

from finetune.lora import LoraConfig, attach
from finetune.parameters import linear_layers
from tests.fixtures.architectures import architecture
from tests.fixtures.classes import CLASSES, tiny, tiny_model


@pytest.mark.parametrize("family", CLASSES)
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
