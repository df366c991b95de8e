"""Bytes of weights, adapter and optimizer. Golden numbers are worked out by hand from the forms' definitions."""

import dataclasses

import pytest

from finetune.parameters import linear_parameters
from finetune.plan import weights
from finetune.plan.inputs import PlanInputs
from tests.fixtures.architectures import architecture

LLAMA = PlanInputs(
    architecture=architecture("llama2_7b"), method="nf4", rank=16, rows=1, tokens=1024, checkpointing=True
)


@pytest.mark.parametrize(
    ("method", "double", "bits"),
    [
        ("none", False, 16),
        ("nf4", False, 4.5),
        ("nf4", True, 4.126953125),
        ("fp4", False, 4.5),
        ("qat", True, 16 + 4.126953125),
    ],
)
def test_bits_per_quantized_parameter(method: str, double: bool, bits: float) -> None:
    found = weights.weight_bytes(dataclasses.replace(LLAMA, method=method, double=double))
    assert (found.codes + found.constants) * 8 / linear_parameters(LLAMA.architecture) == pytest.approx(bits)


def test_base_of_seven_billion_in_nf4_is_as_the_qlora_paper_says() -> None:
    # 5,048 MB: QLoRA paper, section 2, for the 4-bit base with 7 % for what it counts besides.
    assert weights.weight_bytes(dataclasses.replace(LLAMA, upcast="all")).total / 1e6 == pytest.approx(5048, rel=0.08)


def test_skipped_layers_stay_dense() -> None:
    skipped = dataclasses.replace(LLAMA, keep=("down_proj",))
    skipping, all_quantized = weights.weight_bytes(skipped), weights.weight_bytes(LLAMA)
    more = skipping.total - skipping.unused - (all_quantized.total - all_quantized.unused)
    assert more == pytest.approx(32 * 11008 * 4096 * (2 - 4.5 / 8))


def test_adapter_of_query_and_value_is_counted() -> None:
    # 4,194,304: litgpt's resource table for Llama 2 7B, rank 8.
    assert weights.trainable_parameters(dataclasses.replace(LLAMA, rank=8, targets=("q_proj", "v_proj"))) == 4_194_304


@pytest.mark.parametrize(
    ("name", "per_element"),
    [("adamw_torch", 8), ("paged_adamw_32bit", 8), ("paged_adamw_8bit", 2 + 8 / 256), ("lion_32bit", 4)],
)
def test_optimizer_states_by_form(name: str, per_element: float) -> None:
    inputs = dataclasses.replace(LLAMA, optimizer=name)
    assert weights.optimizer_bytes(inputs) / weights.trainable_parameters(inputs) == pytest.approx(per_element)


def test_small_tensors_keep_float32_states() -> None:
    inputs = dataclasses.replace(LLAMA, architecture=architecture("smollm2_135m"), rank=1)
    assert weights.optimizer_bytes(inputs) == 8 * weights.trainable_parameters(inputs)


def test_torch_keeps_states_in_the_adapters_numbers() -> None:
    inputs = dataclasses.replace(LLAMA, optimizer="adamw_torch", adapter_bytes=2)
    assert weights.optimizer_bytes(inputs) == 4 * weights.trainable_parameters(inputs)


def test_a_large_tensor_takes_whole_segments_of_a_gpu() -> None:
    # 4,096 x 11,008 weights in half a byte are 21.5 MiB, which lie in 22; 4,096 x 4,096 are 8 and share their segment.
    assert weights.weight_bytes(LLAMA).unused == pytest.approx(32 * 3 * 0.5 * 1024**2)
    assert weights.weight_bytes(dataclasses.replace(LLAMA, device="cpu")).unused == 0


def test_a_float32_base_is_priced() -> None:
    # peft's preparation turns every 16-bit weight to float32 where nothing is quantized.
    inputs = dataclasses.replace(LLAMA, method="none", upcast="all", device="cpu")
    assert weights.weight_bytes(inputs).codes == 4 * linear_parameters(LLAMA.architecture)
