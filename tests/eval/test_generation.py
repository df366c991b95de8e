"""Answers in bounded memory."""

from pathlib import Path
from typing import Any

import pytest

from finetune.inference.generation import generate


@pytest.fixture
def model(tiny_base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base)


def test_head_gets_rows_without_gaps_for_which_torch_would_copy_its_weights(model: Any, tokenizer: Any) -> None:
    seen = []
    head = model.get_output_embeddings()
    inner = head.forward
    head.forward = lambda hidden: seen.append(hidden.is_contiguous()) or inner(hidden)
    generate(model, tokenizer, [[1, 40, 50], [1, 60, 70]], max_new_tokens=3, batch_rows=2)
    assert seen
    assert all(seen)


def test_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    generate(model, tokenizer, [[1, 40, 50]], max_new_tokens=2, batch_rows=1)
    assert not model.get_output_embeddings()._forward_pre_hooks
