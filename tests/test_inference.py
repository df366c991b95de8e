"""Measurements against what torch computes from whole logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from finetune.errors import EvalError
from finetune.inference.generation import generate
from finetune.inference.kl_divergence import compare_with_reference, record_reference
from finetune.inference.losses import mean_loss, row_losses
from finetune.inference.rows import group_by_length, read_rows

ROWS = [
    {"input_ids": [1, 40, 50, 60, 2], "labels": [-100, -100, 50, 60, 2]},
    {"input_ids": [1, 70, 80, 90, 100, 110, 120, 2], "labels": [-100, -100, -100, -100, 100, -100, 120, 2]},
    {"input_ids": [1, 33], "labels": [-100, -100]},
    {"input_ids": [1, 44, 2], "labels": [1, -100, 2]},
]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def whole_loss(model: Any, row: dict[str, list[int]]) -> float:
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum"))


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_row_losses_equal_those_from_whole_logits(model: Any, batch_tokens: int) -> None:
    losses = row_losses(model, ROWS, batch_tokens=batch_tokens)
    with torch.no_grad():
        assert [row.loss for row in losses] == pytest.approx([whole_loss(model, row) for row in ROWS], abs=1e-4)
    assert [row.tokens for row in losses] == [3, 3, 0, 1]


def test_loss_in_chunks_equals_loss_in_one_piece(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = row_losses(model, ROWS, batch_tokens=1000)
    monkeypatch.setattr("finetune.inference.logits.CHUNK_BYTES", 2 * 4 * 512)
    assert [row.loss for row in row_losses(model, ROWS, batch_tokens=1000)] == pytest.approx(
        [row.loss for row in at_once], abs=1e-5
    )


def test_model_in_training_mode_is_measured_in_evaluation_mode_and_trains_on(model: Any) -> None:
    model.train()
    row_losses(model, ROWS, batch_tokens=100)
    assert model.training
    model.eval()


def test_softcapped_logits_are_capped(tokenizer: Any) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=0.5,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    gemma.model.embed_tokens.weight.data.mul_(20)
    with torch.no_grad():
        expected = [whole_loss(gemma, row) for row in ROWS]
    assert [row.loss for row in row_losses(gemma, ROWS, batch_tokens=100)] == pytest.approx(expected, abs=1e-3)


def test_scaled_logits_fall_back_to_the_whole_model(tokenizer: Any) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    granite = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            logits_scaling=0.05,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    with torch.no_grad():
        expected = [whole_loss(granite, row) for row in ROWS]
    assert [row.loss for row in row_losses(granite, ROWS, batch_tokens=100)] == pytest.approx(expected, abs=1e-3)


def test_model_agrees_with_itself(model: Any, tmp_path: Path) -> None:
    reference = record_reference(model, ROWS, tmp_path / "reference.f32", batch_tokens=8)
    found = compare_with_reference(model, ROWS, reference, batch_tokens=1000)
    assert found.kl < 1e-6
    assert found.top1_agreement == 1
    assert found.compared_tokens == 7
    assert found.loss == pytest.approx(mean_loss(row_losses(model, ROWS, batch_tokens=1000)), abs=1e-5)
    assert reference.loss == pytest.approx(found.loss, abs=1e-5)


def test_few_distributions_are_compared_and_every_row_has_its_loss(model: Any, tmp_path: Path) -> None:
    reference = record_reference(model, ROWS, tmp_path / "reference.f32", batch_tokens=1000, tokens=3)
    found = compare_with_reference(model, ROWS, reference, batch_tokens=1000)
    assert (tmp_path / "reference.f32").stat().st_size == 3 * 512 * 4
    assert (found.compared_tokens, found.top1_agreement) == (3, 1)
    assert found.losses == reference.losses == row_losses(model, ROWS, batch_tokens=1000)


def test_divergence_is_that_of_the_definition(model: Any, tmp_path: Path) -> None:
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(3)
        reference = record_reference(model, ROWS[:1], tmp_path / "reference.f32", batch_tokens=100)
        ids = torch.tensor([ROWS[0]["input_ids"]])
        p, q = (torch.log_softmax(m(input_ids=ids).logits[0, 1:-1], -1) for m in (model, other))
    found = compare_with_reference(other, ROWS[:1], reference, batch_tokens=100)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)


def test_batched_generation_equals_generation_one_by_one(model: Any, tokenizer: Any) -> None:
    prompts = [[1, 40, 50, 60], [1, 70], [1, 33, 34, 35, 36, 37, 38]]
    together = generate(model, tokenizer, prompts, max_new_tokens=6, batch_rows=3)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=6, batch_rows=1)[0] for prompt in prompts]
    assert together == alone


def test_answer_ends_before_the_end_token(model: Any, tokenizer: Any) -> None:
    written = generate(model, tokenizer, [[1, 40, 50]], max_new_tokens=4, batch_rows=1)[0].tokens
    model.generation_config.eos_token_id = [2, written[1]]
    try:
        answer = generate(model, tokenizer, [[1, 40, 50]], max_new_tokens=4, batch_rows=1)[0]
    finally:
        model.generation_config.eos_token_id = 2
    assert answer.stopped
    assert answer.tokens == written[: written.index(written[1])]


def test_penalty_in_the_generation_config_does_not_touch_greedy_decoding(model: Any, tokenizer: Any) -> None:
    plain = generate(model, tokenizer, [[1, 40, 50]], max_new_tokens=8, batch_rows=1)
    model.generation_config.repetition_penalty = 5.0
    try:
        assert generate(model, tokenizer, [[1, 40, 50]], max_new_tokens=8, batch_rows=1) == plain
    finally:
        model.generation_config.repetition_penalty = 1.0


def test_row_beyond_the_models_positions_is_refused(model: Any) -> None:
    row = {"input_ids": [5] * 513, "labels": [5] * 513}
    with pytest.raises(EvalError, match="513 tokens and the model has 512 positions"):
        row_losses(model, [row], batch_tokens=100)


def test_batches_keep_within_tokens_and_cover_every_row() -> None:
    lengths = [3, 9, 2, 2, 7, 30]
    found = list(group_by_length(lengths, batch_tokens=14))
    assert sorted(index for batch in found for index in batch) == list(range(6))
    assert found[0] == [5]
    assert all(len(batch) * max(lengths[i] for i in batch) <= 14 for batch in found[1:])


def test_a_text_gets_its_first_half_as_prompt(tmp_path: Path) -> None:
    rows = {"input_ids": [[1, 2, 3, 4], [5], [6, 7]], "prompt_ids": [[], [], [6]]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "heldout"))
    assert [row["prompt_ids"] for row in read_rows(tmp_path / "heldout")] == [[1, 2], [5], [6]]
