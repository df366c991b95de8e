"""An adapter that changes nothing, or that holds NaN, is refused when it would be saved."""

import types
from typing import Any

import pytest
import torch

from finetune.errors import TrainError
from finetune.train.stage import require_trained


def model(**values: list[float]) -> Any:
    named = {f"layer.{name}.weight": torch.nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    return types.SimpleNamespace(named_parameters=named.items)


def test_adapter_whose_every_b_is_zero_is_refused() -> None:
    with pytest.raises(TrainError, match=r"every B of the adapter is 0.*train for more steps"):
        require_trained(model(lora_A=[1.0], lora_B=[0.0, 0.0]))
    require_trained(model(lora_A=[1.0], lora_B=[0.0, 1e-9]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_adapter_that_is_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(TrainError, match=rf"1 of 2 trained tensors are not finite \(the first is layer.{name}.weight"):
        require_trained(model(**({"lora_A": [1.0], "lora_B": [1.0]} | {name: [1.0, value]})))
