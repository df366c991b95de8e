"""ZeRO-3 as DeepSpeed reads it, from the launch group and what a step is made of."""

from __future__ import annotations

from typing import Any

from finetune.launch.config import LaunchConfig


def zero3(
    config: LaunchConfig, *, dtype: str, micro_batch: int, accumulate: int, max_grad_norm: float
) -> dict[str, Any]:
    """The settings that accelerate's DeepSpeed plugin takes; nothing in them is left to ``auto``.

    Args:
        config: The launch group.
        dtype: Numbers of the computation.
        micro_batch: Rows of a process at once.
        accumulate: Micro-batches of a step.
        max_grad_norm: ``optim.max_grad_norm``.

    Source: deepspeed.ai, DeepSpeed Configuration JSON.
    """
    host = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": micro_batch * accumulate * config.processes,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": False,  # the adapter is what is saved
            **({"offload_param": host, "offload_optimizer": host} if config.offload else {}),
        },
    }
