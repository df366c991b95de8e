"""Every model option against the class that transformers builds from its dimensions, on the meta device."""

from collections import Counter
from typing import Any

import pytest

from finetune.architecture import ArchitectureConfig
from finetune.config_json import FAMILIES, from_config_json
from finetune.parameters import linear_layers, parameters
from finetune.plan.model_config import UNCOUNTED, config_of_class
from tests.fixtures.architectures import OPTIONS, architecture
from tests.fixtures.classes import CLASSES, few_layers

COUNTED = [name for name in OPTIONS if architecture(name).family not in UNCOUNTED]


def build(found: ArchitectureConfig) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of_class(found))


def check(found: ArchitectureConfig) -> None:
    from torch import nn

    model = build(found)
    assert parameters(found) == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    planned = {
        f"model.layers.{index}.{layer.parent}.{layer.name}": (layer.in_features, layer.out_features, layer.bias)
        for layer in linear_layers(found)
        for index in layer.layers
    }
    assert planned == {name: (m.in_features, m.out_features, m.bias is not None) for name, m in linear.items()}


@pytest.mark.parametrize("name", COUNTED)
def test_few_layers_have_the_parameters_and_linear_layers_of_the_class(name: str) -> None:
    check(few_layers(architecture(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_the_whole_model_has_the_parameters_and_linear_layers_of_the_class(name: str) -> None:
    check(architecture(name))


@pytest.mark.parametrize("family", CLASSES)
def test_a_config_json_gives_the_same_dimensions(family: str, tmp_path: Any) -> None:
    found = few_layers(architecture(CLASSES[family]))
    config_of_class(found).save_pretrained(tmp_path)
    read = from_config_json(tmp_path)
    assert read.letters == found.letters or set(found.letters) == {"f", "s"}
    assert (read.family, parameters(read)) == (family, parameters(found))
    assert Counter(linear_layers(read)) == Counter(linear_layers(found))


def test_every_class_of_an_option_is_tested() -> None:
    assert {architecture(name).family for name in COUNTED} == set(CLASSES)
    assert set(CLASSES) <= set(FAMILIES)
