"""Targets that match are adapted, others are an error, and the adapter has our dtype."""

from pathlib import Path

import pytest
import torch

from finetune.errors import ModelError
from finetune.lora import LoraConfig, attach, cast_adapter, prepare_for_training
from finetune.lora.adapter import match_targets
from tests.fixtures.models import load


def config(**changes: object) -> LoraConfig:
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["all-linear"], "dtype": "float32"} | changes
    return LoraConfig(**settings)  # type: ignore[arg-type]


def test_all_linear_takes_every_linear_layer_but_the_head(tiny_base: Path) -> None:
    found = match_targets(load(tiny_base, "nf4"), ["all-linear"])
    assert set(found) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(found.values()) == {2}


def test_target_that_matches_nothing_is_an_error_that_lists_what_there_is(tiny_base: Path) -> None:
    with pytest.raises(
        ModelError, match=r"lora.targets: qkv_proj match no linear layer. This model has down_proj, gate_proj"
    ):
        match_targets(load(tiny_base, "none"), ["q_proj", "qkv_proj"])


def test_model_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="no linear layer besides its head"):
        match_targets(model, ["all-linear"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_adapter_trains_in_the_dtype_asked_for(tiny_base: Path, dtype: str) -> None:
    adapted = attach(load(tiny_base, "nf4"), config(dtype=dtype), upcast="none", checkpointing=False, seed=1)
    trainable = {name: p.dtype for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert set(trainable.values()) == {getattr(torch, dtype)}
    assert len(trainable) == 28, "A and B for fourteen layers"


def test_the_same_seed_gives_the_same_first_weights(tiny_base: Path) -> None:
    first, second, other = (
        attach(load(tiny_base, "nf4"), config(), upcast="none", checkpointing=False, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    ("upcast", "norm", "embedding"),
    [("none", "bfloat16", "bfloat16"), ("norms", "float32", "bfloat16"), ("all", "float32", "float32")],
)
def test_upcast_reaches_what_it_names_and_nothing_else(tiny_base: Path, upcast: str, norm: str, embedding: str) -> None:
    model = load(tiny_base, "nf4")
    before = model.model.norm.weight.float().clone()
    prepare_for_training(model, upcast=upcast, checkpointing=False)
    assert model.model.norm.weight.dtype == getattr(torch, norm)
    assert model.get_input_embeddings().weight.dtype == getattr(torch, embedding)
    assert torch.equal(model.model.norm.weight.float(), before)
    assert model.get_input_embeddings().weight.shape == (512, 64)
    assert not any(p.requires_grad for p in model.parameters())


def test_cast_counts_what_it_changed(tiny_base: Path) -> None:
    adapted = attach(load(tiny_base, "nf4"), config(), upcast="none", checkpointing=False, seed=1)
    assert cast_adapter(adapted, "float32") == 0
    assert cast_adapter(adapted, "bfloat16") == 28


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rank": 0}, "lora.rank must be at least 1; got 0"),
        ({"alpha": 0.0}, "lora.alpha must be positive, or the adapter has no effect; got 0.0"),
        ({"dropout": 1.0}, "lora.dropout must be at least 0 and below 1; got 1.0"),
        (
            {"targets": []},
            "lora.targets is empty, so nothing would train; name a layer, e.g. [q_proj, v_proj], or [all-linear]",
        ),
        ({"dtype": "int8"}, "lora.dtype must be float32 or bfloat16; got 'int8'"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], problem: str) -> None:
    assert list(config(**changes).problems()) == [problem]
