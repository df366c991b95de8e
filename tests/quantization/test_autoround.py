"""Rounding by calibration: what auto-round makes decodes to the model, and bad input is one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from finetune.quantization import QuantizationConfig
from finetune.quantization.autoround import Rounding, round_model, shape_problem
from finetune.quantization.calibration import calibration_sequences
from finetune.quantization.checkpoint_format import read_format
from finetune.quantization.stored import StoredLayers

WHERE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "trust_remote_code": False}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "train"
    Dataset.from_list([{"input_ids": [number] * 10} for number in range(20)]).save_to_disk(str(folder))
    return folder


def test_calibration_takes_every_row_once_in_a_seeded_order(train: Path) -> None:
    first, again, other = (calibration_sequences(train, rows=99, tokens=25, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    tokens = [token for sequence in first.sequences for token in sequence]
    assert sorted(tokens) == sorted(number for number in range(20) for _ in range(10))
    assert {len(sequence) for sequence in first.sequences} == {25}


def test_calibration_reads_no_more_than_it_needs(train: Path) -> None:
    calibration = calibration_sequences(train, rows=3, tokens=15, seed=1)
    assert (len(calibration.sequences), calibration.total) == (3, 50)


def test_too_little_text_is_one_sentence_with_the_longest_sequences_that_it_fills(train: Path) -> None:
    few = calibration_sequences(train, rows=32, tokens=50, seed=1)
    problem = few.shortage
    assert "at least 8 sequences of calibration_tokens=50" in problem
    assert "200 tokens, which make 4; set calibration_tokens to at most 25" in problem
    enough = calibration_sequences(train, rows=32, tokens=25, seed=1)
    assert enough.shortage == ""


def test_groups_that_do_not_divide_are_named_with_a_size_that_does() -> None:
    shapes = [("q_proj", 576, 576), ("down_proj", 576, 1536)]
    assert shape_problem(shapes, group_size=64) == ""
    problem = shape_problem(shapes, group_size=128)
    assert problem == "group_size=128 does not divide the inputs of q_proj (576); set group_size=64"
    assert "no group size of servers does" in shape_problem([("up_proj", 64, 40)], group_size=32)
    assert "outputs of k_proj (40) are not a multiple of 32" in shape_problem([("k_proj", 40, 64)], group_size=32)


@pytest.fixture(scope="module")
def float32_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in float32, with norms that differ by channel, as trained ones do."""
    folder = tmp_path_factory.mktemp("float32") / "base"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    wide = {
        name: tensor.float() * (1 + torch.rand(tensor.shape, generator=generator) * 8 if "norm" in name else 1)
        for name, tensor in tensors.items()
    }
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def test_scales_of_awq_stay_in_the_norms_of_a_float32_base(float32_base: Path, tmp_path: Path) -> None:
    """auto-round's own files lose them: it writes the original norms over those that it saved in 16 bits."""
    generator = torch.Generator().manual_seed(2)
    sequences = torch.randint(3, 400, (8, 32), generator=generator).tolist()
    rounding = Rounding(method="awq", group_size=32, steps=0, seed=1)
    made = round_model(float32_base, tmp_path / "awq", rounding, sequences=sequences, **WHERE)
    stored = read_format(tmp_path / "awq")
    assert made.layers == 14
    assert stored is not None
    assert (stored.method, stored.bits, stored.group_size) == ("awq", 4, 32)
    before, after = (load_file(folder / "model.safetensors") for folder in (float32_base, tmp_path / "awq"))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    config = QuantizationConfig(method="prequantized")
    layers = StoredLayers(tmp_path / "awq", config, dtype="float32", device="cpu")
    for norm, layer in {"input_layernorm": "self_attn.q_proj", "post_attention_layernorm": "mlp.up_proj"}.items():
        norm, layer = f"model.layers.0.{norm}.weight", f"model.layers.0.{layer}"
        rounded, wanted = layers.dense(layer), before[f"{layer}.weight"] * before[norm]
        error, with_original_norm = (
            float((rounded * tensors[norm] - wanted).norm() / wanted.norm()) for tensors in (after, before)
        )
        assert error < 0.3
        assert with_original_norm > 1.2 * error
