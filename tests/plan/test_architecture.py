"""Counts from dimensions. Golden numbers: transformers 5.23's own classes, built on the meta device and counted."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from finetune.architecture import (
    ArchitectureConfig,
    embedding_parameters,
    from_config_json,
    linear_layers,
    linear_parameters,
    parameters,
)
from finetune.errors import ModelError

MODELS = Path(__file__).parents[2] / "conf" / "model"

COUNTS = [
    ("llama2_7b", 6_738_415_616, 6_476_005_376, 131_072_000),
    ("llama2_13b", 13_015_864_320, 12_687_769_600, 163_840_000),
    ("llama2_70b", 68_976_648_192, 68_451_041_280, 262_144_000),
    ("llama3_8b", 8_030_261_248, 6_979_321_856, 525_336_576),
    ("llama32_1b", 1_235_814_400, 973_078_528, 262_668_288),
    ("mistral_7b", 7_241_732_096, 6_979_321_856, 131_072_000),
    ("qwen25_7b", 7_615_616_512, 6_525_288_448, 544_997_376),
    ("qwen3_4b", 4_022_468_096, 3_633_315_840, 388_956_160),
    ("qwen3_30b_a3b", 30_532_122_624, 905_969_664, 311_164_928),
    ("gemma2_9b", 9_241_705_984, 8_323_596_288, 917_504_000),
    ("gemma3_1b_it", 999_885_952, 697_761_792, 301_989_888),
    ("phi2", 2_779_683_840, 2_516_582_400, 131_072_000),
    ("phi3_mini", 3_821_079_552, 3_623_878_656, 98_500_608),
    ("tinyllama_11b", 1_100_048_384, 968_884_224, 65_536_000),
    ("mixtral_8x7b", 46_702_792_704, 1_342_177_280, 131_072_000),
    ("smollm2_135m", 134_515_008, 106_168_320, 28_311_552),
]


def architecture(name: str) -> ArchitectureConfig:
    return ArchitectureConfig(**OmegaConf.load(MODELS / f"{name}.yaml").architecture)


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
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    }  # fmt: skip
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
