"""The hand count of saved tensors against what autograd really saves."""

import dataclasses
from typing import Any

import pytest

from finetune.architecture import ArchitectureConfig
from finetune.plan.activations import activations, loss_bytes, saved_in_layer
from finetune.plan.inputs import KernelChoice, PlanInputs, TrainerMemoryModel

TINY = ArchitectureConfig(
    family="llama",
    hidden_size=128,
    intermediate_size=384,
    layers=6,
    heads=8,
    kv_heads=4,
    head_dim=16,
    vocab_size=512,
    tied_embeddings=False,
    max_positions=256,
)
INPUTS = PlanInputs(
    architecture=TINY, method="none", rank=8, adapter_bytes=4, rows=2, tokens=50, checkpointing=False, device="cpu"
)
BFLOAT16 = dataclasses.replace(INPUTS, adapter_bytes=2, trainer=TrainerMemoryModel(reduced_input_copies=False))


def saved_bytes(*, adapter_dtype: Any, autocast: bool) -> int:
    """Bytes that autograd keeps for the decoder layers of a tiny Llama with LoRA on every linear layer."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        num_key_value_heads=TINY.kv_heads,
        vocab_size=TINY.vocab_size,
        head_dim=TINY.head_dim,
    )
    model = peft.get_peft_model(
        LlamaModel(config).to(torch.bfloat16), peft.LoraConfig(r=8, target_modules="all-linear")
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    model.enable_input_require_grads()
    # Autocast's own copies of the adapter are not the batch's, and are as many as there are weights.
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.t().shape) for p in model.parameters() if p.dim() == 2
    }
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, TINY.vocab_size, (INPUTS.rows, INPUTS.tokens))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(tokens, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("adapter_bytes", [2, 4])
def test_closed_form_counts_what_autograd_saves(adapter_bytes: int) -> None:
    import torch

    found = saved_bytes(
        adapter_dtype=torch.bfloat16 if adapter_bytes == 2 else torch.float32, autocast=adapter_bytes == 4
    )
    inputs = dataclasses.replace(
        INPUTS, adapter_bytes=adapter_bytes, trainer=TrainerMemoryModel(reduced_input_copies=adapter_bytes == 4)
    )
    assert saved_in_layer(inputs) * inputs.step_tokens * TINY.layers == pytest.approx(found, rel=0.05)


def test_checkpointing_keeps_one_tensor_a_layer() -> None:
    with_it = activations(dataclasses.replace(INPUTS, checkpointing=True))
    # six layers' inputs, the last norm's float32 copy, the loss's gradient; cosine and sine of heads 16 wide
    assert with_it.stored == pytest.approx(INPUTS.step_tokens * (128 * (6 * 2 + 4 + 2) + 2 * 16 * 2))
    assert with_it.peak < activations(INPUTS).peak


def test_eager_attention_grows_with_the_square_of_the_length() -> None:
    eager = dataclasses.replace(BFLOAT16, attention="eager")
    longer = dataclasses.replace(eager, tokens=100)
    assert saved_in_layer(longer) - saved_in_layer(eager) == 8 * 50 * (4 + 2)


def test_eager_attention_over_documents_in_one_row_sees_all_of_them() -> None:
    apart = dataclasses.replace(BFLOAT16, attention="eager", rows=2)
    flat = dataclasses.replace(apart, kernels=KernelChoice(flat=True))
    assert saved_in_layer(flat) - saved_in_layer(apart) == 8 * 50 * (4 + 2)


def test_dropout_keeps_a_mask_and_a_copy_for_each_branch() -> None:
    plain = dataclasses.replace(BFLOAT16, device="cuda", targets=("q_proj", "v_proj"))
    more = saved_in_layer(dataclasses.replace(plain, dropout=True)) - saved_in_layer(plain)
    assert more == 2 * 3 * 128 - 2 * 128


def test_a_pair_of_answers_is_two_documents() -> None:
    one, pair = activations(INPUTS), activations(dataclasses.replace(INPUTS, documents=2))
    assert pair.stored > 1.9 * one.stored


@pytest.mark.parametrize("cap", [None, 30.0])
def test_trls_loss_without_triton_is_counted_on_its_own_code(cap: float | None) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    from finetune.plan.fake import LiveBytes

    wide = dataclasses.replace(TINY, vocab_size=65536, softcap=cap is not None)
    inputs = dataclasses.replace(INPUTS, architecture=wide)
    with FakeTensorMode():
        hidden = torch.empty(inputs.step_tokens, TINY.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        head = torch.empty(wide.vocab_size, TINY.hidden_size, dtype=torch.bfloat16)
        targets = torch.empty(inputs.step_tokens, dtype=torch.long)
        with LiveBytes([hidden, head, targets], size=float) as alive:
            logprobs = ChunkedLogProbFunction.apply(
                hidden, head, None, targets, 1.0, inputs.trainer.loss_tile[1], cap, 1.0, ()
            )[0]
            logprobs.sum().backward()
    assert loss_bytes(inputs) == pytest.approx(alive.peak, rel=0.01)


def test_int8_holds_on_to_its_inputs_although_layers_are_computed_again() -> None:
    again = dataclasses.replace(INPUTS, checkpointing=True)
    more = activations(dataclasses.replace(again, method="int8")).stored - activations(again).stored
    assert more == 6 * INPUTS.step_tokens * 2 * (3 * 128 + 384)


def test_selective_checkpointing_keeps_only_the_input_of_gated_layers() -> None:
    fused = dataclasses.replace(INPUTS, kernels=KernelChoice(fused=True))
    selective = dataclasses.replace(INPUTS, kernels=KernelChoice(fused=True, selective=True))
    assert saved_in_layer(fused) - saved_in_layer(selective) > 2 * 2 * 384
    assert activations(selective).peak < activations(fused).peak


def test_old_bitsandbytes_keeps_inputs_of_frozen_layers() -> None:
    new = dataclasses.replace(BFLOAT16, method="nf4", targets=("q_proj",))
    old = dataclasses.replace(new, trainer=TrainerMemoryModel(keeps_inputs=True, reduced_input_copies=False))
    assert saved_in_layer(old) - saved_in_layer(new) == 2 * (128 + 384)
