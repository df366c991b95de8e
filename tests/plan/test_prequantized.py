"""The plan of a base that is stored quantized has the bytes that its layers take once they are loaded."""

from pathlib import Path

import pytest

from finetune.config import load
from finetune.errors import ConfigError, ModelError
from finetune.hardware import probe
from finetune.plan.fit import overrides
from finetune.plan.product import changes
from finetune.plan.settings import from_config, planned_quantization
from finetune.plan.weights import weight_bytes
from finetune.quantization import quantized_layers
from finetune.quantization.backends import packed_weight
from tests.fixtures.models import model_spec, quantization_config
from tests.fixtures.quantized_bases import FORMS, write_quantized


def settings(folder: Path) -> list[str]:
    return ["+experiment=quickstart", "model=custom", f"model.name={folder}", "quantization=prequantized"]


@pytest.mark.parametrize("name", ["gptq 4 bits", "gptq 3 bits", "gptq whole rows", "awq", "int4", "int8", "FP8 blocks"])
def test_the_bytes_of_packed_layers_are_known(tmp_path: Path, tiny_base: Path, name: str) -> None:
    write_quantized(tiny_base, tmp_path / "base", FORMS[name])
    config = load(settings(tmp_path / "base"))
    planned = weight_bytes(from_config(config, probe(config.hardware)))
    loaded = model_spec(tmp_path / "base", quantization_config("prequantized")).load()
    weights = [packed_weight(layer) for layer in quantized_layers(loaded).values()]
    constants = [
        (part, tensor) for weight in weights for part, tensor in weight.constants.items() if part != "weight_shape"
    ]
    assert planned.codes == sum(weight.codes.nbytes for weight in weights)
    assert planned.constants == sum(tensor.nbytes for _, tensor in constants)


def test_no_other_quantization_is_proposed(tmp_path: Path, tiny_base: Path) -> None:
    write_quantized(tiny_base, tmp_path / "base", FORMS["awq"])
    config = load([*settings(tmp_path / "base"), "hardware=rtx3060_12gb"])
    inputs = from_config(config, probe(config.hardware))
    assert inputs.method == "prequantized"
    assert not any("quantization" in change for change in changes(inputs))
    assert "quantization" not in overrides(inputs, inputs)


def test_layers_that_the_config_leaves_out_count_as_dense(tmp_path: Path, tiny_base: Path) -> None:
    form = FORMS["awq"]
    form.config["modules_to_not_convert"] = ["down_proj"]
    try:
        write_quantized(tiny_base, tmp_path / "base", form)
    finally:
        del form.config["modules_to_not_convert"]
    config = load(settings(tmp_path / "base"))
    inputs = from_config(config, probe(config.hardware))
    assert inputs.keep == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def test_a_gguf_file_is_not_stored_quantized_here() -> None:
    config = load(["+experiment=quickstart", "quantization=prequantized"])
    with pytest.raises(ModelError, match="a GGUF file is converted to dense weights; choose quantization=nf4_double"):
        planned_quantization(config, config.model.architecture)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("merge.choose=original", "merge.choose=original needs the unquantized base"),
        ("export=[gguf_lora]", "format gguf_lora starts from the unquantized base"),
        ("export=[bitsandbytes]", "format bitsandbytes starts from the unquantized base"),
        ("lora.variant=loftq", "lora.variant=loftq corrects the error of 4-bit rounding"),
        ("launch=fsdp", "quantization.method=prequantized cannot be cut into shards"),
        ("quantization.skip_modules=[down_proj]", "quantization=prequantized quantizes nothing"),
    ],
)
def test_what_needs_a_dense_base_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load([*settings(tmp_path), setting])
    assert message in str(refused.value)
