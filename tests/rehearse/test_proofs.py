"""Each proof holds on a sound model and fails on one with its bug planted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import TrainError
from finetune.lora import LoraConfig
from finetune.model import Base
from finetune.quantization import quantized_layers
from finetune.rehearse import Rehearsal, RehearseConfig, proofs, rehearse
from finetune.rehearse.bench import Bench
from finetune.speed.steps import SwiGlu
from tests.quantization.test_bnb import PLACEMENT
from tests.rehearse.conftest import SPEED


@pytest.mark.parametrize("prove", proofs.QUICK, ids=lambda prove: prove.__name__)
def test_proof_holds_on_a_sound_model(prove: Any, bench: Bench) -> None:
    found = prove(bench)
    assert found["passed"], found


def test_masked_end_of_turn_is_caught(bench: Bench) -> None:
    end = bench.tokenizer.eos_token_id
    for row in bench.documents:
        row["labels"] = [-100 if label == end else label for label in row["labels"]]
    assert not proofs.trained_text_ends(bench)["passed"]


def test_adapter_that_does_not_start_at_zero_is_caught(bench: Bench) -> None:
    next(p for name, p in bench.model.named_parameters() if "lora_B" in name).data += 0.5
    assert not proofs.adapter_starts_as_identity(bench)["passed"]


def test_frozen_adapter_matrix_is_caught_by_name(bench: Bench) -> None:
    name, matrix = next((name, p) for name, p in bench.model.named_parameters() if "v_proj.lora_A" in name)
    hook = matrix.register_hook(torch.zeros_like)
    found = proofs.gradient_reaches_adapter_only(bench)
    hook.remove()
    assert not found["passed"]
    assert name in found["figure"]


def test_base_weight_that_trains_is_caught(bench: Bench) -> None:
    bench.model.get_base_model().model.norm.weight.requires_grad_(True)
    found = proofs.gradient_reaches_adapter_only(bench)
    assert not found["passed"]
    assert "1 base weights" in found["figure"]


def test_weights_that_change_in_an_evaluation_are_caught(bench: Bench) -> None:
    """What bitsandbytes does on AVX512-BF16 CPUs, planted so that every CPU can try it."""
    layer = next(iter(quantized_layers(bench.model).values()))

    def repack(module: Any, inputs: Any, output: Any) -> None:
        if not module.training:
            module.weight.data.add_(16)

    layer.register_forward_hook(repack)
    assert not proofs.evaluation_leaves_gradients(bench)["passed"]


def run(folder: Path, adapted: Any, quick: Any, tokenizer: Any, data: Any) -> Rehearsal:
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=["all-linear"], dtype="float32")
    base = Base(folder=folder, name="tiny", revision=None, sha256="", source="folder")
    return rehearse(
        RehearseConfig(level="quick", rows=4), folder=folder, adapted=adapted, tokenizer=tokenizer, data=data,
        base=base, quantization={}, lora=lora, upcast="none", placement=PLACEMENT, quick=quick, speed=SPEED, seed=1,
    )  # fmt: skip


def contaminate(adapted: Any) -> None:
    """Attention that knows neither positions nor borders: documents of a row read each other."""
    inner = adapted.get_base_model()
    forward = inner.forward

    def contaminated(*arguments: Any, position_ids: Any = None, cu_seq_lens_q: Any = None, **inputs: Any) -> Any:
        return forward(*arguments, **inputs)

    inner.forward = contaminated


def test_attention_across_documents_is_caught(bench: Bench) -> None:
    contaminate(bench.model)
    assert not proofs.packing_keeps_documents_apart(bench)["passed"]


def test_quick_steps_with_a_wrong_factor_are_caught_and_turned_off(
    tmp_path: Any, adapted: Any, quick: Any, tokenizer: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = SwiGlu.backward
    monkeypatch.setattr(SwiGlu, "backward", lambda self, grad, raw: 2 * sound(self, grad, raw))
    found = run(tmp_path, adapted, quick, tokenizer, data)
    assert not found.quick
    assert [proof["name"] for proof in found.proofs if not proof["passed"]] == [proofs.SPEED]


def test_failed_proof_stops_the_run_with_the_likely_cause(tmp_path: Any, adapted: Any, quick: Any, tokenizer: Any, data: Any) -> None:
    next(p for name, p in adapted.named_parameters() if "lora_B" in name).data += 0.5
    with pytest.raises(TrainError, match=r"1 of 6 proofs fail.*B does not start at zero"):
        run(tmp_path, adapted, quick, tokenizer, data)


def test_attention_that_mixes_documents_makes_training_unpack_them(
    tmp_path: Any, adapted: Any, quick: Any, tokenizer: Any, data: Any
) -> None:
    contaminate(adapted)
    rehearsal = run(tmp_path, adapted, quick, tokenizer, data)
    assert not rehearsal.isolates
    assert [proof["name"] for proof in rehearsal.proofs if not proof["passed"]] == [proofs.ISOLATION]


def test_rehearsal_leaves_the_adapter_as_it_was(bench: Bench) -> None:
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters() if p.requires_grad}
    for prove in proofs.QUICK:
        prove(bench)
    after = dict(bench.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
