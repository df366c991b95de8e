"""Which quantized checkpoints can be read is decided by their config.json, before weights are downloaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.compatibility import check_stored_form
from finetune.errors import ModelError
from finetune.quantization.checkpoint_format import parse, read_format
from tests.fixtures.quantized_bases import FORMS

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
INT4: dict[str, Any] = FORMS["int4"].config
FP8: dict[str, Any] = FORMS["FP8 blocks"].config


def with_weights(**changes: Any) -> dict[str, Any]:
    """Returns INT4 with other settings of its weights."""
    group = INT4["config_groups"]["group_0"]
    return INT4 | {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


@pytest.mark.parametrize(
    ("settings", "title", "group_bytes"),
    [
        (GPTQ, "gptq, 4 bits in groups of 128", 2.5),
        (GPTQ | {"bits": 3, "group_size": -1}, "gptq, 3 bits in one scale per row", 2.375),
        (AWQ | {"version": "GEMM"}, "awq, 4 bits in groups of 128", 2.5),
        (INT4, "compressed-tensors, 4 bits in groups of 32", 2),
        (with_weights(symmetric=False), "compressed-tensors, 4 bits in groups of 32", 2.5),
        (FP8, "fp8, 8 bits in blocks of 32 x 32", 4),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes, 4 bits in groups of 64",
            4,
        ),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bits in one scale per row", 4),
    ],
)
def test_a_format_that_can_be_read_is_described(settings: Any, title: str, group_bytes: float) -> None:
    stored = parse(settings, where=Path("config.json"))
    assert (stored.title, stored.group_bytes) == (title, group_bytes)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "exl2", "bits": 4}, "quant_method=exl2"),
        ({"quant_method": "auto-round", "bits": 4}, "quant_method=auto-round"),
        ({"quant_method": "mxfp4"}, "quant_method=mxfp4"),
        ({"bits": 4}, "quant_method=unknown"),
        ("gptq", "AttributeError"),
        ({"quant_method": "gptq"}, "KeyError: 'bits'"),
        (GPTQ | {"bits": 5}, "bits=5"),
        (GPTQ | {"bits": "four"}, "bits=four"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format=marlin"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format=True"),
        (GPTQ | {"lm_head": True}, "lm_head=True"),
        (GPTQ | {"dynamic": {"-:.*down.*": {}}}, "dynamic="),
        (GPTQ | {"group_size": 0}, "group_size=0"),
        (AWQ | {"bits": 3}, "bits=3"),
        (AWQ | {"version": "gemv"}, "version=gemv"),
        (INT4 | {"format": "nvfp4-pack-quantized"}, "format=nvfp4-pack-quantized"),
        (INT4 | {"format": "marlin-24"}, "format=marlin-24"),
        (INT4 | {"quantization_status": "frozen"}, "quantization_status=frozen"),
        (INT4 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
        (INT4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format=sparse-24-bitmask"),
        (INT4 | {"transform_config": {"R1": {}}}, "transform_config="),
        (with_weights(num_bits=3), "weights=int with 3 bits"),
        (with_weights(strategy="tensor_group"), "strategy=tensor_group"),
        (FP8 | {"fmt": "e5m2"}, "fmt=e5m2"),
        (FP8 | {"weight_block_size": None}, "weight_block_size=None"),
        ({"quant_method": "bitsandbytes"}, "load_in_8bit=None"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(settings: Any, named: str) -> None:
    with pytest.raises(ModelError) as refused:
        parse(settings, where=Path("config.json"))
    assert f"quantization_config: {named}" in str(refused.value)
    assert "which cannot be read; these can: gptq (2, 3, 4 and 8 bits" in str(refused.value)


def folder_with(base: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    settings = json.loads((base / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(settings))
    return target


def test_base_and_setting_must_agree_before_weights_are_there(tmp_path: Path, tiny_base: Path) -> None:
    dense = folder_with(tiny_base, tmp_path / "dense")
    packed = folder_with(tiny_base, tmp_path / "packed", quantization_config=GPTQ | {"group_size": 32})
    check_stored_form(dense, method="nf4")
    check_stored_form(packed, method="prequantized")
    with pytest.raises(ModelError, match="has no quantization_config, so its weights are dense; choose quant"):
        check_stored_form(dense, method="prequantized")
    with pytest.raises(ModelError, match=r"gptq, 4 bits in groups of 32\), and quantization.method=nf4 would round th"):
        check_stored_form(packed, method="nf4")


def test_a_group_size_that_does_not_divide_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    packed = folder_with(tiny_base, tmp_path / "packed", quantization_config=GPTQ)
    with pytest.raises(ModelError, match=r"group_size=128 in .* does not divide the inputs of gate_proj, k_proj, o_pr"):
        check_stored_form(packed, method="prequantized")


def test_an_old_gptq_folder_is_not_taken_for_a_dense_one(tmp_path: Path, tiny_base: Path) -> None:
    folder = folder_with(tiny_base, tmp_path / "old")
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ))
    with pytest.raises(ModelError, match=r"has a quantize_config.json, and its config.json no quantization_config"):
        read_format(folder)


def test_layers_are_skipped_by_parts_of_names_and_by_expressions() -> None:
    stored = parse(INT4 | {"ignore": ["lm_head", "re:.*layers\\.1\\."]}, where=Path("config.json"))
    assert stored.skips("model.layers.1.mlp.up_proj")
    assert not stored.skips("model.layers.11.mlp.up_proj")
