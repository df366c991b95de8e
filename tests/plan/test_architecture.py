"""Counts from dimensions. Golden numbers: transformers 5.23's own classes, built on the meta device and counted."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from finetune.architecture import ArchitectureConfig
from finetune.config_json import from_config_json
from finetune.errors import ModelError
from finetune.parameters import embedding_parameters, linear_layers, linear_parameters, parameters
from tests.fixtures.architectures import COUNTS, MODELS, architecture


@pytest.mark.parametrize(("name", "total", "linear", "embedding"), COUNTS)
def test_counts_are_those_of_the_real_classes(name: str, total: int, linear: int, embedding: int) -> None:
    found = architecture(name)
    assert (parameters(found), linear_parameters(found), embedding_parameters(found)) == (total, linear, embedding)


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_model_has_possible_dimensions(file: Path) -> None:
    dimensions = OmegaConf.load(file).get("architecture")
    if dimensions is not None:
        assert list(ArchitectureConfig(**dimensions).problems()) == []


def test_fused_layers_have_their_own_names() -> None:
    assert [linear.name for linear in linear_layers(architecture("phi3_mini"))] == [
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    ]


def test_experts_are_not_linear_layers() -> None:
    assert {linear.name for linear in linear_layers(architecture("mixtral_8x7b"))} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_a_local_folder_tells_its_dimensions(tmp_path: Path) -> None:
    content = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert from_config_json(tmp_path) == architecture("llama3_8b")


def test_a_missing_dimension_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 32}')
    with pytest.raises(ModelError, match="has no hidden_size"):
        from_config_json(tmp_path)


def test_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="'mamba'; known are llama"):
        from_config_json(tmp_path)


def test_broken_json_is_located(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama",\n oops}')
    with pytest.raises(ModelError, match="line 2"):
        from_config_json(tmp_path)


def test_dimensions_that_cannot_be_are_refused() -> None:
    found = architecture("llama2_7b")
    found.kv_heads, found.layers = 5, 0
    assert len(list(found.problems())) == 2
