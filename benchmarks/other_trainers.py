"""How other projects' training scripts use memory, which is needed to compare the closed form with their figures.

No flag is fitted: each was read in the named source at the named commit. Bytes per vocabulary entry follow the
tensors that are alive together while the loss is computed backwards.
"""

from dataclasses import replace

from finetune.plan.inputs import TrainerMemoryModel

LITGPT = TrainerMemoryModel(
    logits_bytes=6,  # in bf16: logits, which the loop still names, their log-softmax, and its gradient
    logits_held_bytes=2,
    keeps_qkv=True,
    one_qkv_branch=True,
    repeats_kv=True,
    unties=True,
    reduced_input_copies=False,
    cuts_all=True,
)
"""litgpt/model.py, lora.py and utils.py @ 26857050. Saved tensors of its block were counted with torch's hooks."""

LITGPT_QUANTIZED = replace(LITGPT, quantizes_head=True, keeps_inputs=True, keeps_last_graph=1)
"""The same with Fabric's BitsandbytesPrecision, which replaces every nn.Linear. bitsandbytes 0.42 until December
2024."""

LITGPT_2023 = replace(LITGPT, norm_bytes=2)
"""lit_gpt @ 8641822 (October 2023): RMSNorm stays in bf16."""

LITGPT_2023_QUANTIZED = replace(LITGPT_QUANTIZED, norm_bytes=2, keeps_last_graph=0.5)
"""The same with bitsandbytes 0.41.1. The row before the longest one has any length up to the longest; half is
expected."""

TRANSFORMERS = TrainerMemoryModel(
    logits_bytes=16,  # 16-bit logits and gradient, float32 log-softmax, its gradient, and that of the shifted slice
    repeats_kv=True,
    keeps_inputs=True,
    reenters=True,
    cuts_all=True,
)
"""transformers before 4.45 with peft: ``logits.float()``, a shifted copy, cross entropy in float32."""

TRANSFORMERS_HELD = replace(
    TRANSFORMERS, logits_bytes=18, logits_held_bytes=4, reduced_input_copies=False, reenters=False
)
"""The same in a script that keeps the model's output until the step is over: fsdp_qlora/train.py @ 05ed9f2."""

TORCHTUNE = TrainerMemoryModel(
    logits_bytes=2,  # 16-bit logits of all chunks; log-softmax and gradients of one of eight chunks at a time
    reduced_input_copies=False,
    cuts_all=True,
)
"""torchtune's CEWithChunkedOutputLoss with 8 chunks."""

FUSED_LOSS = TrainerMemoryModel(reduced_input_copies=False, reenters=True, cuts_all=True)
"""Cut cross entropy or a fused head: no logits beyond a tile."""
