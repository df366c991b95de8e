"""How other people's training scripts spend memory: what has to be known to compare the closed form with their figures.

Nothing here is fitted: each flag was read in the named source at the named commit. Bytes per vocabulary entry follow
the tensors that are alive together while the loss is computed backwards.
"""

from finetune.plan.inputs import OURS, Trainer

LITGPT = Trainer(
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

LITGPT_QUANTIZED = Trainer(
    logits_bytes=6,
    logits_held_bytes=2,
    keeps_qkv=True,
    one_qkv_branch=True,
    repeats_kv=True,
    unties=True,
    quantizes_head=True,
    keeps_inputs=True,
    keeps_last_graph=1,
    reduced_input_copies=False,
    cuts_all=True,
)
"""The same with Fabric's BitsandbytesPrecision, which replaces every nn.Linear. bitsandbytes 0.42 until December 2024."""

LITGPT_2023 = Trainer(
    logits_bytes=6,
    logits_held_bytes=2,
    norm_bytes=2,
    keeps_qkv=True,
    one_qkv_branch=True,
    repeats_kv=True,
    unties=True,
    reduced_input_copies=False,
    cuts_all=True,
)
"""lit_gpt @ 8641822 (October 2023): RMSNorm stays in bf16."""

LITGPT_2023_QUANTIZED = Trainer(
    logits_bytes=6,
    logits_held_bytes=2,
    norm_bytes=2,
    keeps_qkv=True,
    one_qkv_branch=True,
    repeats_kv=True,
    unties=True,
    quantizes_head=True,
    keeps_inputs=True,
    keeps_last_graph=0.5,  # the longest row's predecessor is of any length up to the longest; half of it is expected
    reduced_input_copies=False,
    cuts_all=True,
)
"""The same with bitsandbytes 0.41.1."""

TRANSFORMERS = Trainer(
    logits_bytes=16,  # 16-bit logits and gradient, float32 log-softmax, its gradient, and that of the shifted slice
    repeats_kv=True,
    keeps_inputs=True,
    reenters=True,
    cuts_all=True,
)
"""transformers before 4.45 with peft: ``logits.float()``, a shifted copy, cross entropy in float32."""

TRANSFORMERS_HELD = Trainer(
    logits_bytes=18,
    logits_held_bytes=4,
    repeats_kv=True,
    keeps_inputs=True,
    reduced_input_copies=False,
    cuts_all=True,
)
"""The same in a script that keeps the model's output until the step is over: fsdp_qlora/train.py @ 05ed9f2."""

TORCHTUNE = Trainer(
    logits_bytes=2,  # 16-bit logits of all chunks; log-softmax and gradients of one of eight chunks at a time
    norm_bytes=4,
    reduced_input_copies=False,
    cuts_all=True,
)
"""torchtune's CEWithChunkedOutputLoss with 8 chunks."""

FUSED_LOSS = Trainer(logits_bytes=0, repeats_kv=False, reduced_input_copies=False, reenters=True, cuts_all=True)
"""Cut cross entropy or a fused head: no logits beyond a tile."""

__all__ = [
    "FUSED_LOSS", "LITGPT", "LITGPT_2023", "LITGPT_2023_QUANTIZED", "LITGPT_QUANTIZED", "OURS", "TORCHTUNE",
    "TRANSFORMERS", "TRANSFORMERS_HELD",
]  # fmt: skip
