"""The plan of a training on rewards: sampling is a phase, with the keys and values of one batch of answers."""

import math

from finetune.config import load
from finetune.plan.phases import device_phases
from finetune.plan.settings import from_config
from tests.fixtures.architectures import machine

EXPERIMENT = ["+experiment=grpo_quick", "train.grpo.batch_rows=1024"]
KEY_BYTES = 2 * 3 * 64 * 4
"""Keys and values of the 135M's three heads of 64 numbers in float32, a token and a layer."""

LAYERS = 30


def sampling(*overrides: str) -> dict[str, float]:
    return device_phases(from_config(load([*EXPERIMENT, *overrides]), machine()))["sample"]


def test_the_cache_has_every_token_of_every_answer_of_a_batch() -> None:
    """96 tokens of prompt and 24 of answer; while a layer's cache grows, it is there twice."""
    assert sampling()["cache"] == 4 * 8 * (96 + 24) * (LAYERS + 1) * KEY_BYTES


def test_sampling_grows_with_group_prompts_and_length_up_to_the_batch() -> None:
    start = sampling()
    assert sampling("train.grpo.group=16")["cache"] == 2 * start["cache"]
    assert sampling("train.rows_per_step=8")["cache"] == 2 * start["cache"]
    longer = sampling("train.grpo.max_new_tokens=144")
    assert math.isclose(longer["cache"], start["cache"] * (96 + 144) / (96 + 24))
    assert longer["activations"] == start["activations"], "prompts are no longer, and one token is computed at a time"
    bounded = sampling("train.grpo.batch_rows=16", "train.grpo.group=64")
    assert bounded["cache"] == start["cache"] / 2
    assert bounded["activations"] < start["activations"]


def test_sampling_computes_no_gradients_and_keeps_weights_and_optimizer() -> None:
    phases = device_phases(from_config(load(EXPERIMENT), machine()))
    step, sample = phases["step"], phases["sample"]
    assert "gradients" not in sample
    assert "loss" not in sample
    for term in ("weights", "adapter", "optimizer"):
        assert sample[term] == step[term] > 0
    assert "sample" not in device_phases(from_config(load(["+experiment=quickstart"]), machine()))
