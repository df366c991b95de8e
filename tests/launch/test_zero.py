"""ZeRO-3's settings come from the launch group; accelerate's plugin and DeepSpeed's own validation accept them."""

import copy
import dataclasses
import importlib.util

import pytest

from finetune.errors import HardwareError
from finetune.launch import LaunchConfig
from finetune.launch.start import check_strategy, zero3

LAUNCH = LaunchConfig(strategy="deepspeed", processes=8, offload=True)
SETTINGS = zero3(LAUNCH, dtype="bfloat16", micro_batch=2, accumulate=4, max_grad_norm=0.3)


def test_settings_are_those_of_the_launch_group() -> None:
    assert SETTINGS["train_batch_size"] == 64
    assert SETTINGS["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    kept = zero3(
        LaunchConfig(strategy="deepspeed", processes=2, offload=False),
        dtype="float16",
        micro_batch=1,
        accumulate=1,
        max_grad_norm=1,
    )
    assert "offload_param" not in kept["zero_optimization"]
    assert (kept["fp16"]["enabled"], kept["bf16"]["enabled"]) == (True, False)


def test_accelerates_plugin_takes_them() -> None:
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(SETTINGS))
    assert (plugin.zero_stage, plugin.hf_ds_config.is_zero3(), plugin.hf_ds_config.is_offload()) == (3, True, True)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed")
def test_deepspeeds_own_validation_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    alone = dataclasses.replace(LAUNCH, processes=1)  # it counts the processes that are there
    read = DeepSpeedConfig(zero3(alone, dtype="bfloat16", micro_batch=2, accumulate=4, max_grad_norm=0.3))
    assert (read.zero_config.stage, read.gradient_clipping, read.train_batch_size) == (3, 0.3, 8)


def test_training_with_it_is_refused_with_the_reason() -> None:
    with pytest.raises(HardwareError, match="first puts the whole quantized base on each device; choose launch=fsdp"):
        check_strategy(LAUNCH)
